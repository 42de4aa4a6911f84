import pytest
import torch
import torch.nn.functional as F

from ddim_fast.ops import native
from ddim_fast.ops.group_norm_silu import (
    _registered,
    _registered_backward,
    group_norm_silu,
    group_norm_silu_reference,
)
from tests.helpers.pairs import every_pair

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = ("pre_shift", "scale", "shift", "residual", "skip")

# exp(-y) may be infinite, and y / (1 + exp(-y)) then is 0, as it should be; in the interpreter, NumPy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

# One parameter of the fixture `backend`, or two: those that have a backward pass.
interpreter_only = pytest.mark.parametrize("backend", ["triton-interpreter"], indirect=True)
differentiable = pytest.mark.parametrize(
    "backend", ["triton-interpreter", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)
on_the_gpu = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")], indirect=True
)


def make_call(
    n=2,
    channels=24,
    size=(5, 7),
    groups=4,
    *,
    layout="contiguous",
    dtype=torch.float32,
    mean=0.0,
    std=1.0,
    extras=(),
    skip=0,
    device="cpu",
):
    """Arguments of a call, with the optional inputs named in ``extras``."""
    torch.manual_seed(0)

    def image(c):
        values = torch.randn(n, c, *size, dtype=torch.float64) * std + mean
        return values.to(device, dtype).to(memory_format=LAYOUTS[layout])

    def numbers(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device)

    options = {name: numbers(n, channels).to(dtype) for name in ("pre_shift", "scale", "shift") if name in extras}
    if "residual" in extras:
        options["residual"] = image(channels)
    if skip:
        options["skip"] = image(skip)
    return (image(channels - skip), groups, numbers(channels).float(), numbers(channels).float(), 1e-5), options


def in_float64(arguments, options):
    """And contiguous: for channels_last images, PyTorch's statistics on the CPU are the difference of two large sums."""
    x, groups, weight, bias, eps = arguments
    doubled = {name: t.double().contiguous() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    return (x.double().contiguous(), groups, weight.double(), bias.double(), eps), doubled


def assert_as_exact(backend, actual, plain, exact):
    """No more than twice the error of PyTorch's own operators in the same precision: root mean square, and largest, for
    which the rounding of the largest value is the least that PyTorch is taken to err by. Triton's interpreter has no such sums:
    it adds the rows of a tile one after the other, which GPUs add in a tree, and is allowed four times."""
    times = 4 if backend.interpreted else 2
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    error, plain_error = actual.double() - exact, plain.double() - exact
    eps = torch.finfo(actual.dtype).eps
    assert error.square().mean() <= times**2 * plain_error.square().mean()
    assert error.abs().max() <= times * max(plain_error.abs().max(), eps * exact.abs().max())


def assert_as_exact_as_pytorch(backend, arguments, options):
    skip_what_it_cannot(backend, arguments[0].dtype)
    exact_arguments, exact_options = in_float64(arguments, options)
    exact = group_norm_silu_reference(*exact_arguments, **exact_options)
    plain = group_norm_silu_reference(*arguments, **options)
    out = group_norm_silu(*arguments, **options)
    assert_as_exact(backend, out, plain, exact)
    return out


def skip_what_it_cannot(backend, dtype):
    if backend.name == "native" and dtype == torch.float16:
        pytest.skip("float16 is for GPUs")
    if backend.interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off where GPUs round")


def gradients(function, arguments, options, grad):
    """Of every tensor among the inputs, by name."""
    x, groups, weight, bias, eps = arguments
    inputs = {"x": x, "weight": weight, "bias": bias} | options
    inputs = {name: t.detach().clone().requires_grad_() for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    settings = {name: value for name, value in options.items() if name not in inputs}
    tensors = dict(inputs)
    out = function(tensors.pop("x"), groups, tensors.pop("weight"), tensors.pop("bias"), eps, **tensors, **settings)
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad.to(out.dtype)), strict=True))


def test_pre_shift_is_read_where_it_lies(backend):
    """Rows of a larger table, one row for all images, and columns."""
    arguments, _ = make_call(3, 24, device=backend.device)
    table = torch.randn(3, 100, device=backend.device)
    rows = torch.randn(24, 3, device=backend.device)
    for pre_shift in (table[:, 7:31], table[:1, :24].expand(3, -1), rows.t(), table[:, ::4][:, :24]):
        expected = group_norm_silu(*arguments, pre_shift=pre_shift.contiguous())
        assert torch.equal(group_norm_silu(*arguments, pre_shift=pre_shift), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)  # all with all, since no backend serves each
@every_pair(
    shape={
        "x".join(str(v) for v in (s["channels"], *s["size"], s["groups"])): s
        for s in (
            {"channels": 24, "size": (5, 7), "groups": 4},
            {"channels": 32, "size": (8, 8), "groups": 8},  # four channels a group
            {"channels": 130, "size": (3, 3), "groups": 2},  # wider than a strip, and not a multiple of one
            {"channels": 7, "size": (33, 17), "groups": 7},
            {"channels": 96, "size": (4, 4), "groups": 1},
            {"channels": 96, "size": (1, 1), "groups": 8},
            {"n": 1, "channels": 16, "size": (48, 48), "groups": 8},
            {"n": 1, "channels": 5, "size": (83, 97), "groups": 1},  # several tiles on a GPU
        )
    },
    values=[(0.0, 1.0), (-2.3, 0.5), (100.0, 1e-3), (1e-3, 1e-4)],
    layout=list(LAYOUTS),
)
def test_as_exact_as_pytorch(backend, shape, values, dtype, layout):
    mean, std = values
    call = make_call(**shape, layout=layout, dtype=dtype, mean=mean, std=std, device=backend.device)
    assert_as_exact_as_pytorch(backend, *call)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(5, 7), (83, 97)], ids=str)
def test_a_large_mean_costs_no_digits(backend, size, layout):
    """Where PyTorch's own operators lose a thousand times what rounding costs."""
    arguments, options = make_call(1, 5, size, 1, mean=100.0, std=1e-3, layout=layout, device=backend.device)
    exact_arguments, _ = in_float64(arguments, options)
    exact = group_norm_silu_reference(*exact_arguments)
    error = (group_norm_silu(*arguments).double() - exact).abs().max()
    assert error <= 8 * torch.finfo(torch.float32).eps * exact.abs().max()


@every_pair(
    additions={
        "pre_shift": {"extras": ("pre_shift",)},
        "film": {"extras": ("scale", "shift")},
        "residual": {"extras": ("residual",)},
        "skip": {"skip": 8},
        # The border cuts a group of twelve channels.
        "everything": {"extras": ("pre_shift", "scale", "shift", "residual"), "skip": 10},
    },
    silu=[True, False],
    layout=list(LAYOUTS),
)
def test_the_additions_of_a_residual_block(backend, additions, silu, layout):
    arguments, options = make_call(channels=36, groups=3, layout=layout, **additions, device=backend.device)
    out = assert_as_exact_as_pytorch(backend, arguments, {**options, "silu": silu})
    assert out.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_strides_and_dtypes_of_the_inputs(backend, layout):
    """Images in another layout than x, or cut from a larger one; numbers that are columns of a larger table, one row for all
    images, or of another dtype than x."""
    everything = ("pre_shift", "scale", "shift", "residual")
    (x, *rest), options = make_call(channels=36, groups=3, layout=layout, extras=everything, skip=10, device=backend.device)
    expected = group_norm_silu_reference(x, *rest, **options | {"pre_shift": options["pre_shift"][:1].expand(2, -1)})
    other = LAYOUTS["channels_last" if layout == "contiguous" else "contiguous"]
    table = torch.cat([options["scale"], options["shift"]], dim=1)
    options["scale"], options["shift"] = table.chunk(2, dim=1)
    options["residual"] = options["residual"].contiguous(memory_format=other)
    options["skip"] = torch.cat([options["skip"]] * 2, dim=3)[..., :7]
    options["pre_shift"] = options["pre_shift"][:1].double().expand(2, -1)
    torch.testing.assert_close(group_norm_silu(x, *rest, **options), expected, atol=1e-5, rtol=1e-5)
    cut = torch.cat([x] * 2, dim=2)[:, :, :5]
    torch.testing.assert_close(group_norm_silu(cut, *rest, **options), expected, atol=1e-5, rtol=1e-5)


@differentiable
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@every_pair(
    shape={
        "plain": {"channels": 24, "size": (5, 7), "groups": 4, "silu": False},
        "skip": {"channels": 32, "size": (8, 8), "groups": 8, "skip": 16},
        "everything": {
            "channels": 36,
            "size": (5, 7),
            "groups": 3,
            "skip": 10,
            "extras": ("pre_shift", "scale", "shift", "residual"),
        },
        "tiles": {"n": 1, "channels": 6, "size": (50, 57), "groups": 1, "skip": 1, "extras": ("pre_shift",)},
    },
    values=[(-2.3, 0.5), (100.0, 1e-3)],
    layout=list(LAYOUTS),
)
def test_gradients_are_as_exact_as_pytorchs(backend, shape, values, dtype, layout):
    mean, std = values
    skip_what_it_cannot(backend, dtype)
    shape = dict(shape)
    silu = shape.pop("silu", True)
    arguments, options = make_call(**shape, layout=layout, dtype=dtype, mean=mean, std=std, device=backend.device)
    if mean == 100.0 and "pre_shift" in options:
        options["pre_shift"] *= std  # or it would be all the spread there is
    options["silu"] = silu
    grad = torch.randn(group_norm_silu_reference(*arguments, **options).shape).to(backend.device, dtype)
    exact = gradients(group_norm_silu_reference, *in_float64(arguments, options), grad.double())
    plain = gradients(group_norm_silu_reference, arguments, options, grad)
    actual = gradients(group_norm_silu, arguments, options, grad)
    assert actual["x"].is_contiguous(memory_format=LAYOUTS[layout])
    for name in exact:
        assert_as_exact(backend, actual[name], plain[name], exact[name])


@differentiable
def test_gradients_take_any_layout_of_the_results(backend):
    arguments, options = make_call(layout="channels_last", skip=4, device=backend.device)
    grad = torch.randn(1, 1, 5, 7, device=backend.device).expand(2, 24, 5, 7)
    expected = gradients(group_norm_silu_reference, arguments, options, grad)
    for name, gradient in gradients(group_norm_silu, arguments, options, grad).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels,size", [(32, (8, 8)), (8, (72, 64))], ids=str)
def test_an_image_has_the_same_bits_in_every_batch_and_on_every_run(backend, channels, size, layout):
    (x, *rest), _ = make_call(n=2, channels=channels, size=size, groups=1, layout=layout, device=backend.device)
    whole = group_norm_silu(x, *rest)
    assert torch.equal(group_norm_silu(x, *rest), whole)
    if backend.name != "cuda":  # it cuts the work by the number of images
        assert torch.equal(torch.cat([group_norm_silu(x[i : i + 1], *rest) for i in range(2)]), whole)


@pytest.mark.skipif(native.module is None, reason=str(native.why_not))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_threads_changes_no_bit(layout, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    (x, *rest), _ = make_call(n=5, channels=64, size=(32, 32), groups=8, layout=layout)
    whole = group_norm_silu(x, *rest)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(group_norm_silu(x, *rest), whole)
    finally:
        torch.set_num_threads(threads)


@differentiable
@pytest.mark.parametrize("size", [(8, 8), (65, 64)], ids=str)
def test_gradients_have_the_same_bits_on_every_run(backend, size):
    extras = ("pre_shift", "scale", "shift")
    arguments, options = make_call(1, 4, size, 1, layout="channels_last", extras=extras, skip=1, device=backend.device)
    grad = torch.randn(1, 4, *size, device=backend.device)
    first, second = (gradients(group_norm_silu, arguments, options, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("missing", [("weight", "bias"), ("weight",), ("bias",)], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_without_parameters(missing, dtype):
    torch._dynamo.reset()
    (x, groups, weight, bias, eps), options = make_call(dtype=dtype, extras=("pre_shift",))
    weight, bias = (None if name in missing else p for name, p in (("weight", weight), ("bias", bias)))
    ones, zeros = torch.ones(24) if weight is None else weight, torch.zeros(24) if bias is None else bias
    expected = group_norm_silu(x, groups, ones, zeros, eps, **options)
    for function in (
        group_norm_silu,
        group_norm_silu_reference,
        torch.compile(group_norm_silu, backend="eager", fullgraph=True),
    ):
        result = function(x, groups, weight, bias, eps, **options)
        assert result.dtype == dtype
        torch.testing.assert_close(
            result, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
    image = x.detach().requires_grad_()
    group_norm_silu(image, groups, weight, bias, eps, **options).sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(5, 7), (72, 64)], ids=str)
def test_nan_stays_in_its_group(backend, size, layout):
    (x, *rest), _ = make_call(channels=8, size=size, groups=2, layout=layout, device=backend.device)
    x[0, 5, 2, 2] = float("nan")
    out = group_norm_silu(x, *rest)
    assert out[0, 4:].isnan().all()
    assert not out[0, :4].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("shape", [{"n": 0}, {"size": (0, 4)}], ids=str)
def test_empty_batches(backend, shape):
    (x, *rest), _ = make_call(**shape, device=backend.device)
    assert group_norm_silu(x, *rest).shape == x.shape


@differentiable
@pytest.mark.parametrize("shape", [{"n": 0}, {"size": (0, 4)}], ids=str)
def test_gradients_of_empty_batches(backend, shape):
    everything = ("pre_shift", "scale", "shift", "residual")
    arguments, options = make_call(**shape, extras=everything, skip=4, device=backend.device)
    for gradient in gradients(group_norm_silu, arguments, options, options["residual"]).values():
        assert not gradient.any()


@pytest.mark.parametrize("forced", ["reference", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(forced, layout, monkeypatch):
    if forced == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    extras = ("pre_shift", "scale", "shift", "residual")
    (x, groups, weight, bias, eps), options = make_call(
        1, 4, (2, 3), 2, dtype=torch.float64, extras=extras, skip=1, layout=layout
    )

    def f(x, weight, bias, *values):
        return _registered(x, groups, weight, bias, eps, True, *values)

    inputs = [t.double().requires_grad_() for t in (x, weight, bias, *(options[name] for name in OPTIONS))]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_gradients_flow_to_every_input():
    (x, groups, weight, bias, eps), options = make_call(
        1, 4, (2, 3), 2, dtype=torch.float64, extras=("pre_shift", "scale", "shift", "residual"), skip=2
    )
    names = list(options)

    def f(x, weight, bias, *values):
        return group_norm_silu(x, groups, weight, bias, eps, **dict(zip(names, values, strict=True)))

    inputs = [t.double().requires_grad_() for t in (x, weight, bias, *options.values())]
    assert torch.autograd.gradcheck(f, inputs)


def test_the_reference_is_the_formula():
    (x, groups, weight, bias, eps), options = make_call(extras=("pre_shift", "scale", "shift", "residual"), skip=4)
    v = torch.cat([x, options["skip"]], 1).double() + options["pre_shift"].double()[:, :, None, None]
    grouped = v.unflatten(1, (groups, -1))
    mean, var = grouped.mean((2, 3, 4), keepdim=True), grouped.var((2, 3, 4), correction=0, keepdim=True)
    y = ((grouped - mean) / (var + eps).sqrt()).flatten(1, 2)
    y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    y = y * (1 + options["scale"].double()[:, :, None, None]) + options["shift"].double()[:, :, None, None]
    expected = y * torch.sigmoid(y) + options["residual"].double()
    torch.testing.assert_close(
        group_norm_silu(x, groups, weight, bias, eps, **options).double(), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("forced", ["", "reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_registered_operators_pass_opcheck(forced, layout, monkeypatch):
    if forced == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here")
    monkeypatch.setenv("DDIM_FAST_BACKEND", forced)
    (x, *rest), options = make_call(layout=layout, extras=("pre_shift", "scale", "shift", "residual"), skip=4)
    values = [options[name] for name in OPTIONS]
    torch.library.opcheck(_registered, (x, *rest, True, *values))
    without_residual = (*values[:3], options["skip"])
    torch.library.opcheck(_registered_backward, (options["residual"], x, *rest, True, *without_residual))
    (x, *rest), _ = make_call(layout=layout)
    torch.library.opcheck(_registered, (x.requires_grad_(), *rest, False, None, None, None, None, None))


@interpreter_only
def test_the_registered_operator_compiles_with_its_gradient(backend):
    (x, *rest), options = make_call(channels=32, groups=8, layout="channels_last", extras=("pre_shift",))
    pre_shift = options["pre_shift"]

    def f(x):
        return _registered(x, *rest, True, pre_shift, None, None, None, None) + 1

    x.requires_grad_()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    out.square().sum().backward()
    expected = torch.autograd.grad((group_norm_silu_reference(x, *rest, **options) + 1).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_compiles_without_a_graph_break_on_a_gpu():
    (x, *rest), options = make_call(
        channels=32, groups=8, layout="channels_last", extras=("pre_shift",), dtype=torch.bfloat16, device="cuda"
    )

    def f(x):
        return group_norm_silu(x, *rest, **options) + 1

    compiled = torch.compile(f, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), f(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(f(x).sum(), x)[0])


@on_the_gpu
@pytest.mark.parametrize("size", [(16, 16), (64, 64)], ids=str)
def test_a_cuda_graph_captures_and_replays(backend, size):
    (x, *rest), options = make_call(
        channels=64, size=size, groups=8, layout="channels_last", dtype=torch.bfloat16, skip=32, device="cuda"
    )
    group_norm_silu(x, *rest, **options)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = group_norm_silu(x, *rest, **options)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, group_norm_silu(x, *rest, **options))


def test_compiles_without_a_graph_break():
    (x, *rest), options = make_call(channels=32, groups=8, layout="channels_last", extras=("pre_shift",))
    compiled = torch.compile(lambda x: group_norm_silu(x, *rest, **options) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), group_norm_silu(x, *rest, **options) + 1)
    x.requires_grad_()
    compiled(x).sum().backward()
    expected = torch.autograd.grad((F.silu(F.group_norm(x + options["pre_shift"][:, :, None, None], *rest))).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-4)


def test_an_export_holds_pytorchs_own_operators_only():
    (x, *rest), _ = make_call()
    model = torch.nn.Module()
    model.forward = lambda x: group_norm_silu(x, *rest)
    graph = torch.export.export(model, (x,)).graph
    assert not [node for node in graph.nodes if "ddim_fast" in str(node.target)]


@pytest.mark.parametrize("channels", [129, 771, 1025, 2**14 + 1])
@interpreter_only
def test_groups_that_triton_cannot_compile_are_refused(backend, channels):
    x, weight = torch.randn(1, channels, 1, 2), torch.ones(channels)
    with pytest.raises(ValueError, match=f"triton cannot serve group_norm_silu: it takes groups of up to .* not {channels}"):
        group_norm_silu(x, 1, weight, weight)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 24, 5)}, "x must be a floating-point tensor of shape"),
        ({"x": torch.zeros(2, 24, 5, 7, dtype=torch.int32)}, "int32"),
        ({"num_groups": 5}, "num_groups must divide the 24 channels; got 5"),
        ({"num_groups": 0}, "num_groups"),
        ({"weight": torch.zeros(23)}, r"weight must have shape \(24,\); got \(23,\)"),
        ({"bias": torch.zeros(24, device="meta")}, "bias is on meta"),
        ({"eps": -1.0}, "eps cannot be negative"),
        ({"eps": float("nan")}, "eps cannot be negative"),
        ({"pre_shift": torch.zeros(1, 24)}, r"pre_shift must have shape \(2, 24\)"),
        ({"scale": torch.zeros(2, 24, dtype=torch.int64)}, "scale is torch.int64"),
        ({"residual": torch.zeros(2, 24, 7, 5)}, "residual must have shape"),
        ({"residual": torch.zeros(2, 24, 5, 7).bfloat16()}, "residual is torch.bfloat16"),
        ({"x": torch.zeros(2, 20, 5, 7), "skip": torch.zeros(2, 4, 5, 6)}, r"skip must have shape \(2, 4, 5, 7\)"),
    ],
)
def test_bad_inputs_are_named(change, message):
    (x, groups, weight, bias, eps), _ = make_call()
    call = {"x": x, "num_groups": groups, "weight": weight, "bias": bias, "eps": eps} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**call)
