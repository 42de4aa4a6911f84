"""The CUDA group_norm_silu of csrc/, on a GPU and, emulated, without one."""

import pytest
import torch

from ddim_fast.ops.group_norm_silu import group_norm_silu_reference
from tests.helpers.pairs import every_pair

pytestmark = pytest.mark.slow  # the emulated module is compiled first

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GUARD = 64  # values on either side of an array that must stay as they are
EXTRAS = ("pre_shift", "scale", "shift", "residual")


def guarded(shape, dtype, layout, device, offset=0):
    """A tensor full of NaN in the midst of NaN, and all of that memory; `offset` values from an address of 16 bytes."""
    numel = torch.Size(shape).numel()
    memory = torch.full((numel + 2 * GUARD + offset,), float("nan"), dtype=dtype, device=device)
    inner = memory[GUARD + offset : GUARD + offset + numel]
    n, c, *size = shape
    if layout == "channels_last":
        return inner.view(n, *size, c).permute(0, 3, 1, 2), memory
    return inner.view(shape), memory


def make_call(
    device, n=2, channels=32, size=(4, 4), groups=4, *, layout="contiguous", dtype=torch.float32, mean=0.0, std=1.0, extras=(),
    skip=0, offset=0, silu=True,
):  # fmt: skip
    """Arguments of a call, every array in the midst of NaN."""
    generator = torch.Generator().manual_seed(0)

    def image(c):
        tensor, _ = guarded((n, c, *size), dtype, layout, device, offset)
        return tensor.copy_(torch.randn(n, c, *size, dtype=torch.float64, generator=generator) * std + mean)

    def numbers(*shape):
        memory = torch.full((shape[0] * shape[-1] + 2 * GUARD,), float("nan"), device=device)
        tensor = memory[GUARD:-GUARD].view(shape) if len(shape) > 1 else memory[GUARD : GUARD + shape[0]]
        return tensor.copy_(torch.randn(shape, generator=generator))

    options = {name: numbers(n, channels) for name in EXTRAS[:3] if name in extras}
    if "residual" in extras:
        options["residual"] = image(channels)
    if skip:
        options["skip"] = image(skip)
    return (image(channels - skip), groups, numbers(channels), numbers(channels), 1e-5), {**options, "silu": silu}


def run(cuda, arguments, options, layout, out=None, offset=0):
    """Calls the CUDA function; returns its result, having looked whether it wrote anything else."""
    x, groups, weight, bias, eps = arguments
    skip = options.get("skip")
    n, channels = x.shape[0], len(weight)
    memory = None
    if out is None:
        out, memory = guarded((n, channels, *x.shape[2:]), x.dtype, layout, cuda.device, offset)
    sizes = [n, x.shape[1], channels - x.shape[1], x.shape[2] * x.shape[3], groups]
    settings = (layout == "channels_last", list(DTYPES.values()).index(x.dtype))
    workspace = torch.full(
        (cuda.module.group_norm_silu_cuda_workspace(sizes, *settings) // 8,),
        float("nan"),
        dtype=torch.float64,
        device=cuda.device,
    )
    tensors = [x, skip, options.get("residual"), out, weight, bias, *(options.get(name) for name in EXTRAS[:3])]
    cuda.module.group_norm_silu_cuda(
        [0 if t is None else t.data_ptr() for t in tensors],
        sizes, eps, options["silu"], *settings, workspace.data_ptr() if len(workspace) else 0, cuda.stream,
    )  # fmt: skip
    if memory is not None:
        assert memory[: GUARD + offset].isnan().all() and memory[-GUARD:].isnan().all()
    return out


def assert_exact(out, arguments, options):
    """No more than twice the error of PyTorch's own operators in the same precision: root mean square, and largest, for
    which the rounding of the largest value is the least that PyTorch is taken to err by."""
    x, groups, weight, bias, eps = arguments
    doubled = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    exact = group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), eps, **doubled)
    plain = group_norm_silu_reference(*arguments, **options).double() - exact
    error = out.double() - exact
    assert error.square().mean() <= 4 * plain.square().mean(), (error.square().mean().sqrt(), plain.square().mean().sqrt())
    rounding = torch.finfo(out.dtype).eps * exact.abs().max()
    assert error.abs().max() <= 2 * max(plain.abs().max(), rounding)


SHAPES = [
    {"channels": 24, "size": (5, 7), "groups": 4},
    {"channels": 32, "size": (8, 8), "groups": 8},  # four channels a group
    {"channels": 130, "size": (3, 3), "groups": 2},
    {"channels": 7, "size": (9, 5), "groups": 7},
    {"channels": 96, "size": (4, 4), "groups": 1},
    {"channels": 96, "size": (1, 1), "groups": 8},
    {"channels": 96, "size": (4, 8), "groups": 32, "n": 9},  # rows grow to several groups of three channels
]


@every_pair(
    shape={"x".join(str(v) for v in (s["channels"], *s["size"], s["groups"])): s for s in SHAPES},
    values=[(0.0, 1.0), (-2.3, 0.5), (100.0, 1e-3)],
    dtype=DTYPES,
    layout=list(LAYOUTS),
)
def test_as_exact_as_pytorch(cuda, shape, values, dtype, layout):
    mean, std = values
    arguments, options = make_call(cuda.device, **shape, layout=layout, dtype=dtype, mean=mean, std=std)
    assert_exact(run(cuda, arguments, options, layout), arguments, options)


@every_pair(
    additions={
        "pre_shift": {"extras": ("pre_shift",)},
        "film": {"extras": ("scale", "shift")},
        "residual": {"extras": ("residual",)},
        "skip": {"skip": 16},
        "everything": {"extras": EXTRAS, "skip": 16},
        "odd": {"extras": EXTRAS, "skip": 10},
    },
    silu={"silu": True, "linear": False},
    dtype=DTYPES,
    layout=list(LAYOUTS),
)
def test_with_the_additions_of_a_residual_block(cuda, additions, silu, dtype, layout):
    # Three groups of sixteen channels: those of skip start within a group.
    arguments, options = make_call(
        cuda.device, channels=48, size=(4, 8), groups=3, layout=layout, dtype=dtype, silu=silu, **additions
    )
    assert_exact(run(cuda, arguments, options, layout), arguments, options)


# 52 and 104 KiB in fp32 for each of two groups.
@every_pair(
    chip={"idle": (132, 227 << 10), "fits": (1, 227 << 10), "split": (1, 40 << 10)},
    size=[(40, 40), (57, 57)],
    dtype=DTYPES,
    layout=list(LAYOUTS),
)
def test_large_groups_whole_and_in_parts(cuda, chip, dtype, layout, size):
    multiprocessors, shared = chip
    if cuda.set_emulation:
        cuda.set_emulation(multiprocessors, shared, False)
    n = 1 if cuda.set_emulation or multiprocessors > 1 else 200
    arguments, options = make_call(
        cuda.device, n, 16, size, 2, layout=layout, dtype=dtype, mean=-2.3, extras=EXTRAS, skip=4 if size[0] % 2 else 8
    )
    assert_exact(run(cuda, arguments, options, layout), arguments, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{}, {"size": (40, 40), "groups": 2, "n": 1}], ids=["whole", "parts"])
@pytest.mark.parametrize("which", ["x", "residual"])
def test_out_may_be_x_or_residual(cuda, which, shape, layout):
    arguments, options = make_call(cuda.device, **shape, layout=layout, dtype=torch.bfloat16, extras=EXTRAS)
    expected = run(cuda, arguments, options, layout)
    run(cuda, arguments, options, layout, out=arguments[0] if which == "x" else options["residual"])
    assert torch.equal(arguments[0] if which == "x" else options["residual"], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unaligned_arrays(cuda, dtype, layout):
    arguments, options = make_call(cuda.device, layout=layout, dtype=dtype, extras=EXTRAS, skip=8, offset=1)
    assert_exact(run(cuda, arguments, options, layout, offset=1), arguments, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [{"channels": 24, "size": (5, 8)}, {"size": (48, 48), "groups": 2, "n": 1}], ids=["whole", "parts"]
)
def test_the_same_input_gives_the_same_bits_in_any_order_of_threads_and_blocks(cuda, shape, layout):
    arguments, options = make_call(cuda.device, **shape, layout=layout, extras=EXTRAS)
    first = run(cuda, arguments, options, layout)
    if cuda.set_emulation:
        cuda.set_emulation(132, 227 << 10, True)
    assert torch.equal(run(cuda, arguments, options, layout), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nan_stays_in_its_group(cuda, dtype, layout):
    if cuda.set_emulation:
        cuda.set_emulation(1, 227 << 10, False)  # several groups a block
    arguments, options = make_call(cuda.device, channels=32, groups=8, layout=layout, dtype=dtype)
    arguments[0][0, 5, 2, 2] = float("nan")
    out = run(cuda, arguments, options, layout)
    assert out[0, 4:8].isnan().all()
    assert not out[0, :4].isnan().any() and not out[0, 8:].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("shape", [{"n": 0}, {"size": (0, 4)}])
def test_empty_batches(cuda, shape):
    arguments, options = make_call(cuda.device, **shape)
    run(cuda, arguments, options, "contiguous")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sizes": [2, 32, 0, 16, 5]}, "groups is 5, but must divide the 32 channels"),
        ({"sizes": [2, 32, 0, 16, 0]}, "groups is 0"),
        ({"sizes": [-1, 32, 0, 16, 4]}, "images and positions cannot be negative"),
        ({"sizes": [2, 0, 32, 16, 4]}, "x_channels must be at least 1"),
        ({"sizes": [2, 16, 16, 16, 4]}, "skip_channels does not fit skip"),
        ({"sizes": [1, 4098, 0, 1, 2]}, "a group has 2049 channels, but may have at most 2048"),
        ({"eps": -1.0}, "eps cannot be negative"),
        ({"eps": float("nan")}, "eps cannot be negative"),
        ({"dtype": 3}, "dtype is 3"),
        ({"pointers": [0] * 9}, "cannot be null"),
        ({"pointers": [16, 0, 0, 18, 16, 16, 0, 0, 0]}, "out is not a multiple"),
        ({"pointers": [16, 0, 0, 16, 16, 16, 0, 2, 0]}, "scale is not a multiple"),
        ({"sizes": [1, 32, 0, 1 << 20, 1]}, "workspace_ptr is a null pointer"),
    ],
)
def test_bad_arguments(cuda, change, message):
    call = {
        "pointers": [16, 0, 0, 16, 16, 16, 0, 0, 0],
        "sizes": [2, 32, 0, 16, 4],
        "eps": 1e-5,
        "silu": True,
        "channels_last": False,
        "dtype": 0,
        "workspace_ptr": 0,
        "stream": 0,
    }
    with pytest.raises(ValueError, match=message):
        cuda.module.group_norm_silu_cuda(**call | change)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{}, {"size": (40, 40), "groups": 2, "n": 1}], ids=["whole", "parts"])
def test_can_be_captured_in_a_graph(gpu, shape, layout):
    arguments, options = make_call(gpu.device, **shape, layout=layout, dtype=torch.bfloat16, extras=EXTRAS)
    expected = run(gpu, arguments, options, layout)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(gpu, arguments, options, layout, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
