"""GroupNorm + SiLU at the shapes of the packaged and the CIFAR-10 networks: each implementation beside PyTorch's two operators
and what torch.compile makes of them. Correct first, then timed."""

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, full, run

from ddim_fast import group_norm_silu
from ddim_fast.ops import native

# channels, side, groups
SHAPES = [(128, 32, 32), (256, 16, 32), (256, 4, 32), *full((32, 32, 8), (64, 8, 8), (384, 16, 32))]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS = ["triton", "cuda"] if DEVICE == "cuda" else ["native"]


def _pytorch(x, groups, weight, bias, eps):
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


@pytest.fixture(params=[512, *full(1, 64)] if DEVICE == "cuda" else [8, *full(1, 64)], ids=lambda n: f"batch{n}")
def batch(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["channels_last", *full("contiguous")])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("implementation", ["pytorch", "compiled", *OURS])
def test_group_norm_silu(benchmark, batch, shape, layout, dtype, implementation, monkeypatch):
    torch.manual_seed(0)
    channels, side, groups = shape
    x = torch.randn(batch, channels, side, side, device=DEVICE).to(DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    weight, bias = (torch.randn(channels, device=DEVICE).to(x.dtype) for _ in range(2))
    arguments = (x, groups, weight, bias, 1e-5)
    if implementation in OURS:
        if implementation in ("native", "cuda") and native.module is None:
            pytest.skip(native.why_not)
        monkeypatch.setenv("DDIM_FAST_BACKEND", implementation)
        operator = group_norm_silu
    elif implementation == "compiled":
        torch.compiler.reset()  # compiles for this shape alone
        operator = torch.compile(_pytorch, fullgraph=True)
    else:
        operator = _pytorch
    expected = _pytorch(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    tolerance = 1e-5 if x.dtype == torch.float32 else 5e-2
    benchmark.group = f"group_norm_silu {dtype} {layout} {batch}x{'x'.join(map(str, shape))}"
    with torch.no_grad():
        torch.testing.assert_close(operator(*arguments).double(), expected, atol=tolerance, rtol=tolerance)
        run(benchmark, lambda: operator(*arguments), x.dtype, moved=2 * x.numel() * x.element_size())
