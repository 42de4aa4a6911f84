"""The machine code of the attention kernels, compiled ahead of time with the host functions' own block sizes, what it computes,
and what the host functions refuse. The source is checked in tests/ops/test_attention.py."""

import sys

import pytest
import torch

from tests.helpers.ahead_of_time import assert_fits, compile_ahead, compile_alone
from tests.helpers.ptx_on_cpu import run_ptx

# (dtype, heads, tokens, head dimension), for all block sizes but those of float64.
CASES = (
    (torch.bfloat16, 4, 200, 32),
    (torch.float16, 4, 4096, 64),
    (torch.float16, 1, 16, 128),
    (torch.bfloat16, 1, 16, 256),
    (torch.bfloat16, 1, 64, 256),
    (torch.bfloat16, 1, 256, 256),
    (torch.float32, 1, 256, 64),
    (torch.float32, 1, 256, 256),
)


def check_machine_code(capability: int) -> None:
    from ddim_fast.kernels.attention import attention, attention_backward

    for dtype, heads, tokens, dim in CASES:
        query, key, value, grad = (torch.empty(2, tokens, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(4))

        def call(query=query, key=key, value=value, grad=grad):
            out, lse = attention(query, key, value, 0.1)
            attention_backward(grad, query, key, value, out, lse, 0.1)

        kernels = compile_ahead(capability, call)
        assert [k.name for k in kernels] == ["attention_kernel", "attention_dq_kernel", "attention_dkdv_kernel"]
        for kernel in kernels:
            case = f"{kernel.name} for {dtype}, {tokens} tokens, head dimension {dim}"
            assert_fits(kernel, capability)
            # 16-byte copies to shared memory that run ahead of the products
            assert "cp.async.cg.shared.global" in kernel.ptx, case
            if dtype != torch.float32:
                rows = 16 if tokens == 16 and kernel is kernels[0] else 64  # a warpgroup's instruction takes 64 at least
                instruction = "wgmma.mma_async" if capability >= 90 and rows == 64 else "mma.sync"
                assert instruction in kernel.ptx, case
            assert "tf32" not in kernel.ptx, case


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"query": torch.zeros(2, 5, 8)}, "query must be a floating-point tensor of 4 dimensions"),
        ({"query": torch.zeros(1, 2, 5, 8, dtype=torch.int32)}, "query must be .* got torch.int32"),
        ({"query": torch.zeros(1, 2, 5, 257)}, "query has head dimension 257, but must have 1 to 256"),
        ({"key": torch.zeros(1, 2, 7, 9)}, r"key has shape \(1, 2, 7, 9\), but must have \(1, 2, 7, 8\)"),
        ({"value": torch.zeros(1, 2, 6, 8)}, r"value has shape \(1, 2, 6, 8\), but must have \(1, 2, 7, 8\)"),
        ({"key": torch.zeros(1, 2, 7, 8).half()}, "key is torch.float16, but query is torch.float32"),
        ({"value": torch.zeros(1, 2, 7, 8, device="meta")}, "value is on meta, but query is on cpu"),
        ({"grad": torch.zeros(1, 2, 4, 8)}, r"grad has shape \(1, 2, 4, 8\), but must have \(1, 2, 5, 8\)"),
        ({"out": torch.zeros(1, 2, 5, 8).double()}, "out is torch.float64"),
        ({"lse": torch.zeros(1, 2, 4)}, "lse must come from attention"),
        ({"lse": torch.zeros(1, 2, 5).half()}, "lse must come from attention; got torch.float16"),
    ],
)
def test_bad_inputs_are_named(change, message):
    pytest.importorskip("triton")
    from ddim_fast.kernels.attention import attention, attention_backward

    tensors = {
        "grad": torch.zeros(1, 2, 5, 8),
        "query": torch.zeros(1, 2, 5, 8),
        "key": torch.zeros(1, 2, 7, 8),
        "value": torch.zeros(1, 2, 7, 8),
        "out": torch.zeros(1, 2, 5, 8),
        "lse": torch.zeros(1, 2, 5),
    } | change
    with pytest.raises(ValueError, match=message):
        attention_backward(**tensors, scale=1.0)
    if change.keys() & {"query", "key", "value"}:
        with pytest.raises(ValueError, match=message):
            attention(tensors["query"], tensors["key"], tensors["value"], 1.0)


def check_numbers(capability: int) -> None:
    """That the compiled kernels give what the definition gives, forward and backward."""
    from ddim_fast.kernels.attention import attention, attention_backward
    from ddim_fast.ops.attention import attention_reference

    for dtype, tokens, dim in (
        (torch.bfloat16, 16, 128),
        (torch.bfloat16, 64, 128),
        (torch.float16, 33, 40),
        (torch.bfloat16, 130, 64),
        (torch.float32, 33, 20),
    ):
        torch.manual_seed(0)
        inputs = [torch.randn(1, tokens, 2, dim).to(dtype).transpose(1, 2) for _ in range(3)]
        grad = torch.randn(1, tokens, 2, dim).to(dtype).transpose(1, 2)
        out, lse = run_ptx(lambda: attention(*inputs, dim**-0.5), capability)  # noqa: B023
        found = run_ptx(lambda: attention_backward(grad, *inputs, out, lse, dim**-0.5), capability)  # noqa: B023
        doubles = [t.double().requires_grad_() for t in inputs]
        exact = attention_reference(*doubles)
        expected = (exact.detach(), *torch.autograd.grad(exact, doubles, grad.double()))
        for name, actual, right in zip(("out", "dq", "dk", "dv"), (out, *found), expected, strict=True):
            error = (actual.double() - right).abs().max() / right.abs().max()
            assert error < 8 * torch.finfo(dtype).eps, f"{name}, {dtype}, {tokens} tokens, head dimension {dim}: {error}"


@pytest.mark.slow
def test_what_is_compiled_computes_what_is_meant():
    pytest.importorskip("triton")
    compile_alone(__file__, 80, "numbers")


if __name__ == "__main__":
    (check_numbers if "numbers" in sys.argv else check_machine_code)(int(sys.argv[1]))
