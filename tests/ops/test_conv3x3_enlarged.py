"""An enlarged image's 3x3 convolution as one transposed convolution, which is for GPUs; here on the CPU."""

import pytest
import torch

from ddim_fast.ops import measured
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_cached, conv3x3_reference, prepare_conv3x3
from tests.helpers.pairs import every_pair

# N, C, K, H, W: odd sides, one pixel, one channel; images and, of height 1, signals.
SHAPES = [(2, 8, 12, 5, 4), (1, 3, 1, 1, 1), (3, 36, 36, 2, 7), (0, 4, 4, 3, 3)]


@pytest.fixture(autouse=True)
def _transposed(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("DDIM_FAST_BACKEND", "triton")


def make(n, c, k, h, w, rows=3, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (n, c, h, w), (k, c, rows, 3), (k,), (n, k, (2 if rows == 3 else 1) * h, 2 * w)
    x, weight, bias, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    x, residual = (t.to(dtype, memory_format=torch.channels_last) for t in (x, residual))
    return [t.to(device) for t in (x, weight.to(dtype), bias.to(dtype), residual)]


@every_pair(shape=SHAPES, rows=[3, 1], with_bias=[False, True], with_residual=[False, True])
def test_is_the_enlargement_and_the_convolution(shape, rows, with_bias, with_residual):
    if rows == 1:
        shape = (*shape[:3], 1, shape[4])
    x, weight, bias, residual = make(*shape, rows)
    bias, residual = bias if with_bias else None, residual if with_residual else None
    prepared = prepare_conv3x3(weight, torch.float64)
    assert prepared[0].shape == (shape[1], shape[2], 4 if rows == 3 else 1, 4)
    ours = conv3x3(x, weight * float("nan"), bias, residual=residual, upsample=True, prepared=prepared)
    exact = conv3x3_reference(x, weight, bias, residual=residual, upsample=True)
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


def errors(ours, theirs, exact):
    """The largest and the root mean square error of ours, as multiples of PyTorch's."""
    ours, theirs = ((t - exact).abs() for t in (ours, theirs))
    return float(ours.max() / theirs.max()), float(ours.square().mean().sqrt() / theirs.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [False, True])
def test_is_as_exact_as_pytorch(dtype, narrow):
    """Whether the sums are rounded once, or are of weights that had been rounded before. In float16 PyTorch serves on a CPU."""
    x, weight, bias, residual = make(2, 64, 64, 8, 8)
    x, residual, weight = x.to(dtype), residual.to(dtype), weight / (3 * 64**0.5)
    weight = weight.to(dtype if narrow else torch.float32)
    exact = conv3x3_reference(x.double(), weight.double(), bias, residual=residual.double(), upsample=True)
    prepared = prepare_conv3x3(weight, dtype)
    assert (prepared is None) == (dtype == torch.float16)
    ours = conv3x3(x, weight.to(dtype), bias.float(), residual=residual, upsample=True, prepared=prepared)
    theirs = conv3x3_reference(x, weight.to(dtype), bias.float(), residual=residual, upsample=True)
    assert ours.dtype == dtype
    assert max(errors(ours, theirs, exact)) <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("channels", [16, 256])
def test_the_summed_weights_are_as_exact_as_pytorchs_where_products_are_added_in_float32(dtype, narrow, channels):
    """As tensor cores add them; nothing that follows hides the error."""
    x, weight, _, _ = make(2, channels, channels, 4, 4)
    x, weight = x.to(dtype), (weight / (3 * channels**0.5)).to(dtype if narrow else torch.float32)
    exact = conv3x3_reference(x.double(), weight.double(), upsample=True)
    (summed,) = prepare_conv3x3(weight.float(), torch.float32)
    ours = torch.nn.functional.conv_transpose2d(x.float(), summed.to(dtype).float(), stride=2, padding=1).to(dtype)
    theirs = conv3x3_reference(x.float(), weight.to(dtype).float(), upsample=True).to(dtype)
    assert max(errors(ours, theirs, exact)) <= 2


def test_images_that_keep_their_size_and_gradients_take_the_weights_as_they_are():
    x, weight, bias, _ = make(*SHAPES[0])
    assert prepare_conv3x3(weight, x.dtype, size=(5, 4)) is None
    prepared = prepare_conv3x3(weight, x.dtype)
    assert torch.equal(conv3x3(x, weight, prepared=prepared), conv3x3_reference(x, weight))
    x.requires_grad_()
    ours = torch.autograd.grad(conv3x3(x, weight, bias, upsample=True, prepared=prepared).square().sum(), x)
    theirs = torch.autograd.grad(conv3x3_reference(x, weight, bias, upsample=True).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_weights_of_somebody_else_are_prepared_once_and_never_stale(monkeypatch):
    x, weight, bias, _ = make(*SHAPES[0], dtype=torch.float32)
    made = []

    def noted(*arguments, **options):
        made.append(options)
        return prepare_conv3x3(*arguments, **options)

    monkeypatch.setattr("ddim_fast.ops.conv3x3.prepare_conv3x3", noted)
    for changed in (False, False, True):
        if changed:
            weight.mul_(3)
        ours = conv3x3_cached(x, weight, bias, upsample=True)
        torch.testing.assert_close(ours, conv3x3_reference(x, weight, bias, upsample=True), atol=1e-5, rtol=1e-5)
    assert len(made) == 2
    # The same weight for an image that keeps its size, in another dtype than the weight's.
    out = conv3x3_cached(x.double(), weight)
    assert torch.equal(out, conv3x3_reference(x.double(), weight.double()))


def test_compiles_without_a_break_and_to_pytorchs_operators():
    x, weight, bias, residual = make(*SHAPES[0], dtype=torch.float32)
    prepared = prepare_conv3x3(weight, x.dtype)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(conv3x3, fullgraph=True, backend=backend)
    options = {"residual": residual, "upsample": True, "prepared": prepared}
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias, **options), conv3x3(x, weight, bias, **options))
    assert "conv_transpose2d" in graphs[0].code and "ddim_fast" not in graphs[0].code


def test_pytorch_serves_where_no_result_says_that_ours_is_faster(monkeypatch):
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    monkeypatch.setattr(measured, "compute_capability", lambda device: "sm_90")
    monkeypatch.setattr("ddim_fast.ops.conv3x3.why_not_triton", lambda device: None)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    weight = torch.zeros(16, 16, 3, 3).as_subclass(OnGpu)
    assert prepare_conv3x3(weight, torch.bfloat16) is None
    row = ("conv3x3_enlarged", "sm_90", "bfloat16", "channels_last")
    monkeypatch.setattr(measured, "FASTER_ON_GPU", frozenset({row}))
    assert prepare_conv3x3(weight, torch.bfloat16) is not None
    assert prepare_conv3x3(weight, torch.float32) is None
    assert prepare_conv3x3(torch.zeros(8, 8, 3, 3), torch.bfloat16) is None  # on a CPU


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(2, 4, 5, 4)}, r"x must have shape \(N, 8, H, W\) to fit the weights"),
        ({"x": torch.zeros(2, 8, 5, 4).half()}, "x is torch.float16 on cpu, but the weights were prepared as torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \(12,\)"),
        ({"residual": torch.zeros(2, 12, 5, 4)}, r"residual must have shape \(2, 12, 10, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    x, weight, bias, _ = make(*SHAPES[0], dtype=torch.float32)
    arguments = {"x": x, "weight": weight, "bias": bias, "prepared": prepare_conv3x3(weight, x.dtype)} | change
    with pytest.raises(ValueError, match=message):
        conv3x3(**arguments, upsample=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", [False, True])
def test_on_a_gpu_it_is_as_exact_as_pytorch(dtype, narrow):
    x, weight, _, _ = make(2, 64, 64, 8, 8, device="cuda")
    x, weight = x.to(dtype), (weight / (3 * 64**0.5)).to(dtype if narrow else torch.float32)
    exact = conv3x3_reference(x.double(), weight.double(), upsample=True)
    ours = conv3x3(x, weight, upsample=True, prepared=prepare_conv3x3(weight, dtype))
    theirs = conv3x3_reference(x, weight.to(dtype), upsample=True)
    assert errors(ours, theirs, exact)[1] <= 2
