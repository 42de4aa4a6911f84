"""Attention at the shapes of the packaged and the CIFAR-10 networks: each implementation beside PyTorch's operator, the formula
and what torch.compile makes of it. Correct first, then timed.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, full, run

from ddim_fast.ops.attention import attention

SHAPES = [(1, 256, 256), *full((1, 16, 256), (1, 64, 128))]  # heads, tokens, head dimension
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _formula(query, key, value):
    weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[3] ** -0.5, dim=-1)
    return weights @ value


OPERATORS = {
    "formula": _formula,
    "compiled": torch.compile(_formula, fullgraph=True),
    "pytorch": F.scaled_dot_product_attention,
    "triton": attention,
}


@pytest.fixture(params=[512, *full(1, 64)] if DEVICE == "cuda" else [8, *full(1)], ids=lambda n: f"batch{n}")
def batch(request):
    return request.param


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def shape(request, batch):
    return batch, *request.param


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("implementation", OPERATORS)
def test_attention(benchmark, shape, dtype, implementation, monkeypatch):
    if implementation == "triton":
        if DEVICE == "cpu":
            pytest.skip("needs a CUDA GPU")
        monkeypatch.setenv("DDIM_FAST_BACKEND", "triton")
    torch.compiler.reset()  # compiles for this shape alone
    torch.manual_seed(0)
    n, heads, tokens, dim = shape
    inputs = [torch.randn(n, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(3)]
    operator = OPERATORS[implementation]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    benchmark.group = f"attention {dtype} {shape}"
    with torch.no_grad():
        expected = _formula(*(t.double() for t in inputs))
        torch.testing.assert_close(operator(*inputs).double(), expected, atol=tolerance, rtol=tolerance)
        size = n * heads * tokens * dim
        run(benchmark, lambda: operator(*inputs), dtype, moved=4 * size * dtype.itemsize, operations=4 * size * tokens)
