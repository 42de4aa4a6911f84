import pytest
import torch
from torch import nn

from ddim_fast.ops import add_bias as module
from ddim_fast.ops import measured
from ddim_fast.ops.add_bias import _registered, add_bias, add_bias_reference, adds_in_one_pass
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_reference
from tests.helpers.pairs import every_pair

LAYOUTS = [torch.channels_last, torch.contiguous_format]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, C, H, W: a power of two, three times one, odd, one, more than a program takes; many rows and few.
SHAPES = [(2, 128, 8, 8), (2, 96, 5, 3), (3, 3, 7, 5), (1, 1, 1, 1), (1, 1030, 2, 3), (2, 2, 33, 65)]

triton_only = pytest.mark.parametrize(
    "backend", ["triton-interpreter", pytest.param("triton", marks=pytest.mark.gpu)], indirect=True
)


def make(shape, dtype=torch.float32, layout=torch.channels_last, device="cpu", mean=0.0):
    """image, bias, shift, residual and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    image, residual, grad = (
        (torch.randn(shape, generator=generator) + mean).to(device, dtype).contiguous(memory_format=layout) for _ in range(3)
    )
    bias, shift = torch.randn(shape[1], generator=generator), torch.randn(shape[:2], generator=generator)
    return image, bias.to(device), shift.to(device), residual, grad


def call(f, image, bias, shift, residual):
    return f(image, bias, shift=shift, residual=residual)


def assert_no_worse(ours, theirs, exact):
    assert ours.dtype == theirs.dtype and ours.shape == exact.shape
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max() / 2
    assert (ours.double() - exact).abs().max() <= 2 * max((theirs.double() - exact).abs().max(), rounding)


@triton_only
@every_pair(
    shape=SHAPES,
    dtype=DTYPES,
    layout={"channels_last": torch.channels_last, "contiguous": torch.contiguous_format},
    terms=["bias", "shift", "residual", "bias residual", "bias shift residual"],
    narrow=[False, True],
)
def test_is_as_exact_as_pytorch(backend, shape, dtype, layout, terms, narrow):
    image, *others, grad = make(shape, dtype, layout, backend.device)
    names = ("bias", "shift", "residual")
    others = [t if name in terms.split() else None for name, t in zip(names, others, strict=True)]
    if narrow:
        others = [None if t is None else t.to(dtype) for t in others]
    results = []
    for f, wide in ((add_bias, None), (add_bias_reference, None), (add_bias_reference, torch.float64)):
        inputs = [None if t is None else t.detach().to(wide or t.dtype).requires_grad_() for t in (image, *others)]
        out = call(f, *inputs)
        gradients = torch.autograd.grad(out, [t for t in inputs if t is not None], grad.to(out.dtype))
        results.append([out.detach(), *gradients])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_no_worse(ours, theirs, exact)
    # Without a gradient the sum is written over the image.
    with torch.no_grad():
        copy = image.clone(memory_format=torch.preserve_format)
        out = call(add_bias, copy, *others)
    assert out.data_ptr() == copy.data_ptr()
    assert torch.equal(out, results[0][0]) and out.stride() == image.stride()


@triton_only
@pytest.mark.parametrize("mean", [-2.3, 1000.0])
def test_large_means(backend, mean):
    image, *others, _ = make((2, 24, 5, 7), torch.bfloat16, device=backend.device, mean=mean)
    exact = call(add_bias_reference, image.double(), *(t.double() for t in others))
    theirs = call(add_bias_reference, image, *others)
    assert_no_worse(call(add_bias, image, *others), theirs, exact)


@triton_only
def test_any_strides(backend):
    image, bias, shift, residual, _ = make((2, 24, 6, 8), layout=torch.contiguous_format, device=backend.device)
    wide = image.repeat_interleave(2, dim=3)[..., ::2]
    kept = wide.clone()
    rows = torch.cat([shift, shift], dim=1)[:, :24]  # of a larger table
    columns = shift.t().contiguous().t()
    for shifts in (rows, columns, shift[:1].expand(2, -1)):
        expected = call(add_bias_reference, image, bias, shifts, residual)
        arguments = (wide, bias.repeat_interleave(2)[::2], shifts, residual.contiguous(memory_format=torch.channels_last))
        assert torch.equal(call(add_bias, *arguments), expected)
    assert torch.equal(wide, kept)  # what is no dense image is not written over


@triton_only
@pytest.mark.parametrize("shape", [(0, 16, 4, 4), (2, 16, 0, 4)])
def test_no_images_and_no_pixels_are_no_error(backend, shape):
    image, *others, grad = make(shape, device=backend.device)
    others[0].requires_grad_()
    out = call(add_bias, image, *others)
    assert out.shape == shape
    assert torch.equal(torch.autograd.grad(out, others[0], grad)[0], torch.zeros_like(others[0]))


@triton_only
def test_nan_and_infinity_stay_where_they_are(backend):
    image, *others, _ = make((1, 16, 4, 4), device=backend.device)
    image[0, 3, 1, 2], image[0, 5, 0, 0] = float("nan"), float("inf")
    expected = call(add_bias_reference, image, *others)
    torch.testing.assert_close(call(add_bias, image, *others), expected, equal_nan=True)


@triton_only
def test_is_a_proper_operator_with_a_proper_gradient(backend):
    image, bias, shift, residual, _ = make((2, 2, 2, 1), device=backend.device)
    inputs = [t.double().contiguous().requires_grad_() for t in (image, bias, shift, residual)]
    torch.library.opcheck(_registered, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: call(add_bias, *tensors), inputs)
    assert torch.autograd.gradgradcheck(lambda *tensors: call(add_bias, *tensors), inputs)


@triton_only
@pytest.mark.parametrize("upsample", [False, True])
def test_the_convolution_takes_it_forward_and_backward(backend, upsample, monkeypatch):
    x, _, _, _, _ = make((2, 16, 4, 6), device=backend.device)
    weight = torch.randn(32, 16, 3, 3, device=backend.device) / 12
    bias = torch.randn(32, device=backend.device)
    residual = torch.randn_like(conv3x3_reference(x, weight, upsample=upsample))
    seen = []
    run = module._run_triton
    implementation = module.IMPLEMENTATIONS[0]
    noted = module.Implementation("triton", lambda c: seen.append(c) or run(c), implementation.why_not)
    monkeypatch.setattr(module, "IMPLEMENTATIONS", (noted, *module.IMPLEMENTATIONS[1:]))
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def with_gradients(f):
        out = f(x, weight, bias, residual=residual, upsample=upsample)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    torch.testing.assert_close(with_gradients(conv3x3), with_gradients(conv3x3_reference), atol=1e-4, rtol=1e-5)
    assert len(seen) == 1 and seen[0].residual is residual
    with torch.no_grad():
        conv3x3(x, weight)  # nothing to add
    assert len(seen) == 1


@triton_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_residual_may_be_wider(backend, dtype):
    x, bias, _, residual, _ = make((2, 4, 3, 2), device=backend.device)
    weight = torch.randn(4, 4, 3, 3, device=backend.device)
    with torch.no_grad(), torch.autocast(backend.device, torch.bfloat16):
        expected = conv3x3_reference(x, weight, bias, residual=residual.to(dtype))
        out = conv3x3(x, weight, bias, residual=residual.to(dtype))
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=0.1, rtol=2e-2)


@pytest.mark.parametrize("row", ["add_bias", "conv3x3"])
def test_pytorch_serves_where_no_result_says_that_ours_is_faster(monkeypatch, row):
    monkeypatch.delenv("DDIM_FAST_BACKEND", raising=False)
    monkeypatch.setattr(measured, "compute_capability", lambda device: "sm_90")
    monkeypatch.setattr(module, "why_not_triton", lambda device: None)
    x = torch.empty(1, 16, 2, 2, dtype=torch.bfloat16, memory_format=torch.channels_last)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    on_gpu = x.as_subclass(OnGpu)
    assert not adds_in_one_pass(on_gpu)
    monkeypatch.setattr(measured, "FASTER_ON_GPU", frozenset({(row, "sm_90", "bfloat16", "channels_last")}))
    assert adds_in_one_pass(on_gpu) == (row == "add_bias")
    assert not adds_in_one_pass(on_gpu.float()) and not adds_in_one_pass(on_gpu.contiguous())
    assert not adds_in_one_pass(x)


def test_compiled_code_leaves_the_sums_to_the_compiler(monkeypatch):
    """Which fuses them; an operator of ours would stand in its way."""
    pytest.importorskip("triton")
    monkeypatch.setenv("DDIM_FAST_BACKEND", "triton")
    image, *others, _ = make((2, 4, 3, 2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *tensors: call(add_bias, *tensors), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(image, *others), call(add_bias_reference, image, *others))
    assert "ddim_fast" not in graphs[0].code


@pytest.mark.parametrize(
    "change,message",
    [
        ({"image": torch.zeros(2, 3)}, r"image must be a floating-point tensor of shape \(N, C, H, W\)"),
        ({"image": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, "image must be .* got torch.int32"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(3,\); got \(4,\)"),
        ({"shift": torch.zeros(1, 3)}, r"shift must have shape \(2, 3\); got \(1, 3\)"),
        ({"residual": torch.zeros(2, 3, 4, 1)}, r"residual must have shape \(2, 3, 4, 5\)"),
        ({"residual": torch.zeros(2, 3, 4, 5).half()}, "residual is torch.float16, but image is torch.float32"),
        ({"bias": torch.zeros(3).half()}, "bias is torch.float16, but image is torch.float32"),
        ({"shift": torch.zeros(2, 3, device="meta")}, "shift is on meta, but image is on cpu"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"image": torch.zeros(2, 3, 4, 5), "bias": None, "shift": None, "residual": None} | change
    with pytest.raises(ValueError, match=message):
        add_bias(**arguments)


def test_on_a_cpu_the_convolution_adds_its_bias():
    """On a CPU a network's bits are those of PyTorch's convolution with its own bias."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(conv3x3(x, conv.weight, conv.bias), conv(x))
