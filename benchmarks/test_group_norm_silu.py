"""GroupNorm + SiLU at the shapes of the packaged and the CIFAR-10 networks, beside PyTorch's two operators. Correct first, then
timed."""

import pytest
import torch
import torch.nn.functional as F

from ddim_fast import group_norm_silu
from ddim_fast.ops import native

SHAPES = [(1, 32, 32), (64, 32, 32), (64, 128, 8), (8, 128, 32), (8, 256, 16)]
GROUPS = 8


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def shape(request):
    return request.param


@pytest.fixture(params=["contiguous", "channels_last"])
def layout(request):
    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[request.param]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def arguments(request, shape, layout):
    torch.manual_seed(0)
    n, c, side = shape
    x = torch.randn(n, c, side, side, dtype=request.param).to(memory_format=layout)
    weight, bias = torch.randn(c, dtype=request.param), torch.randn(c, dtype=request.param)
    return x, GROUPS, weight, bias, 1e-5


def _pytorch(x, groups, weight, bias, eps):
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@pytest.mark.parametrize("implementation", ["pytorch", "native"])
def test_group_norm_silu(benchmark, arguments, shape, implementation, monkeypatch):
    if implementation == "native" and native.module is None:
        pytest.skip(native.why_not)
    monkeypatch.setenv("DDIM_FAST_BACKEND", "native" if implementation == "native" else "reference")
    run = group_norm_silu if implementation == "native" else _pytorch
    expected = _pytorch(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    tolerance = 1e-5 if arguments[0].dtype == torch.float32 else 5e-2
    with torch.no_grad():
        torch.testing.assert_close(run(*arguments).double(), expected, atol=tolerance, rtol=tolerance)
        benchmark.group = f"{arguments[0].dtype} {shape} {'channels_last' if arguments[0].stride(1) == 1 else 'contiguous'}"
        benchmark(run, *arguments)
