"""The CUDA ddim_step of csrc/, on a GPU and, emulated, without one: the bits of plain fp32 tensor operations."""

import math

import pytest
import torch

from ddim_fast import seeded_noise
from tests.helpers.pairs import every_pair

pytestmark = pytest.mark.slow  # the emulated module is compiled first

COEFFICIENTS = (1.25, -0.75, 0.3, 1.1, 0.9, 0.43, 0.2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP32, BF16, FP16 = range(3)
GUARD = 16
INF = math.inf


def make_arrays(numel, dtypes=(FP32, FP32, FP32), device="cpu", offset=0, seed=0):
    """sample, model_output, unconditional, noise and out, each in the midst of NaN, `offset` values from an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    arrays = []
    for code in (dtypes[0], dtypes[1], dtypes[1], dtypes[0], dtypes[2]):
        memory = torch.full((GUARD + offset + numel + GUARD,), math.nan, dtype=DTYPES[code], device=device)
        arrays.append(memory[GUARD + offset : GUARD + offset + numel])
        if len(arrays) < 5:
            arrays[-1].copy_(torch.randn(numel, generator=generator))
    return arrays, memory


def reference(sample, model_output, unconditional=None, noise=None, clip=INF, guidance=1.0, coefficients=COEFFICIENTS):
    """In fp32, before the last rounding."""
    p, q, r, s, u, v, sigma = torch.tensor(coefficients, device=sample.device)
    x, m = sample.float(), model_output.float()
    if unconditional is not None:
        m = unconditional.float() + torch.tensor(guidance, device=m.device) * (m - unconditional.float())
    x0 = (p * x + q * m).clamp(-clip, clip)
    out = u * x0 + v * (r * x + s * m)
    return out if noise is None else out + sigma * noise.float()


def step(cuda, sample, model_output, out, noise=None, coefficients=COEFFICIENTS, clip=INF, **options):
    codes = tuple(DTYPES.index(t.dtype) for t in (sample, model_output, out))
    tensors = {name: options.pop(name) for name in ("unconditional", "seeds", "table", "index") if name in options}
    cuda.module.ddim_step_cuda(
        sample.data_ptr(),
        model_output.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        out.data_ptr(),
        sample.numel(),
        coefficients,
        clip,
        cuda.stream,
        dtypes=codes,
        **{f"{name}_ptr": tensor.data_ptr() for name, tensor in tensors.items()},
        **options,
    )
    return out


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(bits), expected.view(bits))


def assert_untouched(memory, offset=0):
    assert memory[: GUARD + offset].isnan().all() and memory[-GUARD:].isnan().all()


@every_pair(
    numel=[0, 1, 7, 17, 1023, 4096],
    dtypes=[(0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 1, 0), (0, 2, 1), (1, 0, 2)],
    offset={"aligned": 0, "unaligned": 1, "half-aligned": 4},
    extras={"plain": (), "noise": ("noise",), "guided": ("unconditional", "noise")},
)
def test_same_bits_as_plain_tensor_operations(cuda, numel, dtypes, offset, extras):
    (sample, model_output, unconditional, noise, out), memory = make_arrays(numel, dtypes, cuda.device, offset)
    options = {name: t for name, t in (("unconditional", unconditional), ("noise", noise)) if name in extras}
    guidance = {"guidance": 7.5} if "unconditional" in extras else {}
    step(cuda, sample, model_output, out, clip=1.0, **options, **guidance)
    assert_same_bits(out, reference(sample, model_output, **options, **guidance, clip=1.0).to(out.dtype))
    assert_untouched(memory, offset)


def test_more_elements_than_the_grid_has_threads(cuda):
    (sample, model_output, _, _, out), memory = make_arrays(4096 * 256 * 4 + 37, device=cuda.device)
    step(cuda, sample, model_output, out)
    assert_same_bits(out, reference(sample, model_output))
    assert_untouched(memory)


@pytest.mark.parametrize("dtypes", [(0, 0, 0), (1, 1, 1), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["sample", "model_output", "unconditional", "noise"])
def test_out_may_be_an_input(cuda, which, dtypes):
    (*arrays, _), _ = make_arrays(1000, dtypes, cuda.device)
    sample, model_output, unconditional, noise = arrays
    expected = reference(sample, model_output, unconditional, noise, guidance=3.0)
    out = arrays[which]
    step(cuda, sample, model_output, out, noise, unconditional=unconditional, guidance=3.0)
    assert_same_bits(out, expected.to(out.dtype))


@pytest.mark.parametrize("which", [0, 1, 2, 3], ids=["sample", "model_output", "unconditional", "noise"])
def test_nan_stays_nan_and_where_it_was(cuda, which):
    (*arrays, out), _ = make_arrays(100, (0, 1, 2), cuda.device)
    arrays[which][[0, 50, 99]] = math.nan
    sample, model_output, unconditional, noise = arrays
    step(cuda, sample, model_output, out, noise, clip=1.0, unconditional=unconditional, guidance=2.0)
    assert out.isnan().nonzero().flatten().tolist() == [0, 50, 99]


# Widths of eight, four and one element a thread.
@every_pair(shape=[(1, 4, 6), (3, 2, 2), (3, 5, 7), (1, 1, 2)], dtypes=[(0, 0, 0), (1, 1, 1)], number=[0, 7, 2**32 - 1])
def test_noise_of_seeds(cuda, shape, dtypes, number):
    seeds = torch.tensor([5, 0, 2**40 + 3, 2**63 - 1, 5], device=cuda.device)
    z = seeded_noise(seeds.cpu(), number, shape).flatten().to(cuda.device)
    (sample, model_output, _, _, out), memory = make_arrays(z.numel(), dtypes, cuda.device)
    coefficients = (0, 0, 0, 0, 0, 0, 1)
    step(cuda, sample, model_output, out, coefficients=coefficients, seeds=seeds, image_numel=z.numel() // 5, step=number)
    tolerance = 4e-7 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.float(), z, rtol=tolerance, atol=0)
    assert_untouched(memory)

    step(cuda, sample, model_output, out, seeds=seeds, image_numel=z.numel() // 5, step=number)
    expected = reference(sample, model_output, noise=z).to(out.dtype)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=2e-7)


def test_nothing_is_drawn_where_sigma_is_zero(cuda):
    (sample, model_output, _, _, out), _ = make_arrays(64, device=cuda.device)
    coefficients = (*COEFFICIENTS[:6], 0.0)
    seeds = torch.tensor([3], device=cuda.device)
    step(cuda, sample, model_output, out, coefficients=coefficients, seeds=seeds, image_numel=64)
    assert_same_bits(out, reference(sample, model_output))


def make_table(device):
    return torch.tensor([COEFFICIENTS, tuple(0.5 * c for c in COEFFICIENTS), tuple(2 * c for c in COEFFICIENTS)], device=device)


@pytest.mark.parametrize("with_seeds", [False, True], ids=["plain", "seeds"])
def test_coefficients_from_a_table(cuda, with_seeds):
    table, index = make_table(cuda.device), torch.zeros((), dtype=torch.int64, device=cuda.device)
    (sample, model_output, _, _, out), _ = make_arrays(96, (0, 1, 0), cuda.device)
    seeds = {"seeds": torch.tensor([1, 2], device=cuda.device), "image_numel": 48} if with_seeds else {}
    for row in range(3):
        index.fill_(row)
        step(cuda, sample, model_output, out, coefficients=(), table=table, table_rows=3, index=index, **seeds)
        z = seeded_noise([1, 2], row, (3, 4, 4)).flatten().to(cuda.device) if with_seeds else None
        expected = reference(sample, model_output, noise=z, coefficients=table[row].tolist())
        torch.testing.assert_close(out, expected, rtol=4e-7 if with_seeds else 0, atol=1e-6 if with_seeds else 0)


@pytest.mark.parametrize("row", [-1, 3, 2**62, -(2**63)])
def test_an_index_outside_the_table_gives_nan(cuda, row):
    index = torch.tensor(row, device=cuda.device)
    (sample, model_output, _, _, out), memory = make_arrays(100, device=cuda.device)
    out.zero_()
    step(cuda, sample, model_output, out, coefficients=(), table=make_table(cuda.device), table_rows=3, index=index)
    assert memory.isnan().all()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"sample_ptr": 0}, "sample_ptr is a null pointer"),
        ({"out_ptr": 18}, "out_ptr is not a multiple of its values' 4 bytes"),
        ({"sample_ptr": 64, "out_ptr": 64, "dtypes": (0, 0, 1)}, "out_ptr is sample_ptr, but their dtypes differ in size"),
        ({"noise_ptr": 64, "out_ptr": 64, "dtypes": (1, 0, 0)}, "out_ptr is noise_ptr"),
        ({"unconditional_ptr": 64, "out_ptr": 64, "dtypes": (0, 2, 0)}, "out_ptr is unconditional_ptr"),
        ({"numel": -1}, "numel is -1"),
        ({"coefficients": COEFFICIENTS[:6]}, "6 values instead of 7"),
        ({"clip": math.nan}, "clip is nan"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"dtypes": (0, 3, 0)}, "dtypes is 3"),
        ({"noise_ptr": 64, "seeds_ptr": 64}, "noise_ptr and seeds_ptr cannot both be given"),
        ({"seeds_ptr": 64}, "image_numel is 0"),
        ({"seeds_ptr": 64, "image_numel": 3}, "image_numel is 3, but must divide numel, which is 4"),
        ({"seeds_ptr": 68, "image_numel": 4}, "seeds_ptr is not a multiple"),
        ({"step": 2**32}, "step is 4294967296"),
        ({"step": -1}, "step is -1"),
        ({"table_ptr": 64, "index_ptr": 64}, "table_rows is 0"),
        ({"table_ptr": 64, "table_rows": 1}, "index_ptr is a null pointer"),
        ({"table_ptr": 64, "table_rows": 1, "index_ptr": 68}, "index_ptr is not a multiple"),
    ],
)
def test_bad_arguments(cuda, change, message):
    call = {
        "sample_ptr": 16,
        "model_output_ptr": 16,
        "noise_ptr": 0,
        "out_ptr": 32,
        "numel": 4,
        "coefficients": COEFFICIENTS,
        "clip": INF,
        "stream": 0,
    }
    with pytest.raises(ValueError, match=message):
        cuda.module.ddim_step_cuda(**call | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(0, 0, 0), (0, 1, 0), (1, 1, 1)], ids=str)
def test_one_captured_graph_serves_every_step(gpu, dtypes):
    table, index = make_table("cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    (sample, model_output, unconditional, _, out), memory = make_arrays(6 * 1024 + 3, dtypes, "cuda")
    arguments = (gpu, sample, model_output, out)
    options = {
        "unconditional": unconditional,
        "guidance": 2.0,
        "coefficients": (),
        "table": table,
        "table_rows": 3,
        "index": index,
    }
    step(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*arguments, **options)
    for row in (2, 0, 1):
        index.fill_(row)
        out.fill_(math.nan)
        graph.replay()
        expected = reference(sample, model_output, unconditional, guidance=2.0, coefficients=table[row].tolist())
        assert_same_bits(out, expected.to(out.dtype))
    assert_untouched(memory)
