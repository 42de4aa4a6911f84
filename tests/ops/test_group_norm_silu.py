import pytest
import torch
import torch.nn.functional as F

from ddim_fast.ops import native
from ddim_fast.ops.group_norm_silu import _registered, group_norm_silu, group_norm_silu_reference

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.why_not))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def make_call(
    n=2, channels=24, size=(5, 7), groups=4, *, layout="contiguous", dtype=torch.float32, mean=0.0, std=1.0, extras=(), skip=0
):
    """Arguments of a call, with the optional inputs named in ``extras``."""
    torch.manual_seed(0)

    def image(c):
        return (torch.randn(n, c, *size, dtype=torch.float64) * std + mean).to(dtype).to(memory_format=LAYOUTS[layout])

    options = {name: torch.randn(n, channels, dtype=dtype) for name in ("pre_shift", "scale", "shift") if name in extras}
    if "residual" in extras:
        options["residual"] = image(channels)
    if skip:
        options["skip"] = image(skip)
    return (image(channels - skip), groups, torch.randn(channels), torch.randn(channels), 1e-5), options


def in_float64(arguments, options):
    x, groups, weight, bias, eps = arguments
    doubled = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    return group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), eps, **doubled)


def assert_as_exact_as_pytorch(arguments, options, monkeypatch):
    """No more than twice the error of PyTorch's own operators in the same precision: root mean square, and largest, for
    which the rounding of the largest value is the least that PyTorch is taken to err by."""
    exact = in_float64(arguments, options)
    plain = group_norm_silu_reference(*arguments, **options).double() - exact
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    out = group_norm_silu(*arguments, **options)
    assert out.dtype == arguments[0].dtype and out.shape == exact.shape
    error = out.double() - exact
    assert error.square().mean() <= 4 * plain.square().mean()
    rounding = torch.finfo(out.dtype).eps * exact.abs().max()
    assert error.abs().max() <= 2 * max(plain.abs().max(), rounding)
    return out


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mean,std", [(0.0, 1.0), (-2.3, 0.5), (100.0, 1e-3), (1e-3, 1e-4)])
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 24, "size": (5, 7), "groups": 4},
        {"channels": 32, "size": (8, 8), "groups": 8},  # four channels a group
        {"channels": 130, "size": (3, 3), "groups": 2},  # wider than a strip, and not a multiple of one
        {"channels": 7, "size": (33, 17), "groups": 7},
        {"channels": 96, "size": (4, 4), "groups": 1},
        {"channels": 96, "size": (1, 1), "groups": 8},
        {"n": 1, "channels": 64, "size": (48, 48), "groups": 32},
    ],
    ids=lambda s: "x".join(str(v) for v in (s["channels"], *s["size"], s["groups"])),
)
def test_native_is_as_exact_as_pytorch(shape, mean, std, dtype, layout, monkeypatch):
    assert_as_exact_as_pytorch(*make_call(**shape, layout=layout, dtype=dtype, mean=mean, std=std), monkeypatch)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    "extras,skip",
    [
        (("pre_shift",), 0),
        (("scale", "shift"), 0),
        (("residual",), 0),
        ((), 8),
        (("pre_shift", "scale", "shift", "residual"), 10),
    ],
    ids=["pre_shift", "film", "residual", "skip", "everything"],
)
def test_native_with_the_additions_of_a_residual_block(extras, skip, silu, layout, monkeypatch):
    arguments, options = make_call(channels=36, groups=3, layout=layout, extras=extras, skip=skip)
    out = assert_as_exact_as_pytorch(arguments, {**options, "silu": silu}, monkeypatch)
    assert out.is_contiguous(memory_format=LAYOUTS[layout])


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


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_has_the_same_bits_in_every_batch_and_with_any_number_of_threads(layout, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    (x, *rest), _ = make_call(n=5, channels=64, size=(32, 32), groups=8, layout=layout)
    whole = group_norm_silu(x, *rest)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(group_norm_silu(x, *rest), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([group_norm_silu(x[i : i + 1], *rest) for i in range(5)]), whole)


@needs_native
def test_nan_stays_in_its_group(monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native")
    (x, *rest), _ = make_call(channels=8, groups=2)
    x[0, 5, 2, 2] = float("nan")
    out = group_norm_silu(x, *rest)
    assert out[0, 4:].isnan().all()
    assert not out[0, :4].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("shape", [{"n": 0}, {"size": (0, 4)}])
def test_empty_batches(shape):
    (x, *rest), _ = make_call(**shape)
    assert group_norm_silu(x, *rest).shape == x.shape


def test_gradients_flow_to_every_input():
    (x, groups, weight, bias, eps), options = make_call(
        1, 4, (2, 3), 2, dtype=torch.float64, extras=("pre_shift", "scale", "shift", "residual"), skip=2
    )
    names = list(options)

    def f(x, weight, bias, *values):
        return group_norm_silu(x, groups, weight, bias, eps, **dict(zip(names, values, strict=True)))

    inputs = [t.double().requires_grad_() for t in (x, weight, bias, *options.values())]
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_registered_operator_passes_opcheck(layout):
    (x, *rest), options = make_call(layout=layout, extras=("pre_shift", "scale", "shift", "residual"), skip=4)
    names = ("pre_shift", "scale", "shift", "residual", "skip")
    torch.library.opcheck(_registered, (x, *rest, True, *(options[n] for n in names)))
    (x, *rest), _ = make_call(layout=layout)
    torch.library.opcheck(_registered, (x, *rest, False, None, None, None, None, None))


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
