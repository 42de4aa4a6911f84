"""Halving an image that is padded right and bottom: by a copy, or, for GPUs, by a crop; here on the CPU."""

import pytest
import torch
from torch.nn import functional

from ddim_fast import UNetConfig
from ddim_fast.models.unet_blocks import Downsample
from ddim_fast.ops import measured


@pytest.fixture
def cropping(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("DDIM_FAST_BACKEND", "triton")


def make(channels=6, size=32, **fields):
    torch.manual_seed(0)
    config = UNetConfig(sample_size=size, base_channels=channels, norm_num_groups=1, **fields)
    return Downsample(config, channels).requires_grad_(False)


def padded(module, x):
    """PyTorch's convolution of the padded image."""
    down = module.conv.weight.shape[2] // 2
    return functional.conv2d(functional.pad(x, (0, 1, 0, down)), module.conv.weight, module.conv.bias, (1 + down, 2))


@pytest.mark.parametrize("shape", [(2, 6, 8, 4), (1, 6, 2, 2), (3, 6, 32, 32), (0, 6, 4, 4)])
@pytest.mark.parametrize("one_dimensional", [False, True])
def test_a_crop_of_the_result_is_the_padding(cropping, shape, one_dimensional):
    if one_dimensional:
        shape = (*shape[:2], 1, shape[3])
    module = make(size=(1, 32) if one_dimensional else 32).double()
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    ours, exact = module(x), padded(module, x)
    assert ours.shape == exact.shape and (not len(x) or ours.is_contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-12)


def errors(module, dtype, device="cpu"):
    """The largest and the root mean square error of ours, as multiples of PyTorch's."""
    module, x = module.to(device), torch.randn(2, 64, 8, 8).to(device, dtype, memory_format=torch.channels_last)
    exact = padded(module.double(), x.double())
    module = module.to(dtype, memory_format=torch.channels_last)
    ours, theirs = ((f(x) - exact).abs() for f in (module, lambda x: padded(module, x)))
    return float(ours.max() / theirs.max()), float(ours.square().mean().sqrt() / theirs.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_crop_is_as_exact_as_pytorch(cropping, dtype):
    assert max(errors(make(64), dtype)) <= 2


def test_a_crop_has_the_dtype_and_the_gradients_of_the_padding(cropping):
    module, x = make().requires_grad_(True), torch.randn(2, 6, 4, 4, requires_grad=True)
    inputs = (x, module.conv.weight, module.conv.bias)
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), inputs) for f in (module, lambda x: padded(module, x)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_a_crop_is_as_exact_as_pytorch(cropping, dtype):
    assert max(errors(make(64), dtype, "cuda")) <= 2


def pads(module, x):
    """Whether the module pads by a copy."""
    calls = []
    original, functional.pad = functional.pad, lambda *arguments, **options: calls.append(1) or original(*arguments, **options)
    try:
        module(x)
    finally:
        functional.pad = original
    return bool(calls)


def test_it_crops_where_a_result_says_that_it_is_faster(monkeypatch):
    monkeypatch.setattr(measured, "compute_capability", lambda device: "sm_90")
    monkeypatch.setattr("ddim_fast.models.unet_blocks.why_not_triton", lambda device: None)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    module, x = make().to(torch.bfloat16), torch.zeros(2, 6, 4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert pads(module, x.as_subclass(OnGpu))
    row = ("downsample", "sm_90", "bfloat16", "channels_last")
    monkeypatch.setattr(measured, "FASTER_ON_GPU", frozenset({row}))
    assert pads(module, x.as_subclass(OnGpu))  # gradients have not been timed
    with torch.no_grad():
        assert not pads(module, x.as_subclass(OnGpu))
        assert pads(module, x)  # on the CPU
        assert pads(module.float(), x.float().as_subclass(OnGpu))


def test_what_is_compiled_or_padded_on_all_sides_is_left_to_pytorch(cropping):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module, x = make(), torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend=backend)(x), module(x), atol=1e-6, rtol=1e-6)
    assert "pad(" in graphs[0].code
    module = make(downsample_padding=1)
    assert torch.equal(module(x), functional.conv2d(x, module.conv.weight, module.conv.bias, 2, 1))
