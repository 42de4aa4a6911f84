"""Attention: every query takes the mean of the values, weighted by how well it fits their keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from .dispatch import Implementation, choose, why_not_triton
from .tensors import explain_refusal
from .torch_private import is_observed

__all__ = ["attention", "attention_reference"]

# (dtype, tokens, head dimension, least N * heads) for which the Triton kernel was measured to be at least as fast as PyTorch's
# scaled_dot_product_attention, without gradients: for 1, 8, 64 and 512 images (benchmarks/results/h100/operators.md).
FASTER_IN_TRITON: tuple[tuple[torch.dtype, int, int, int], ...] = (
    (torch.bfloat16, 16, 128, 1),
    (torch.bfloat16, 16, 256, 1),
    (torch.bfloat16, 64, 128, 1),
    (torch.bfloat16, 64, 256, 1),
)


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), without mask or dropout:

        out = softmax(scale * query @ key^T) @ value

    PyTorch's scaled_dot_product_attention serves, but for the shapes in FASTER_IN_TRITON. DDIM_FAST_BACKEND=triton asks for the
    kernel in ``ddim_fast.kernels.attention`` everywhere: it takes float32, bfloat16 and float16, head dimensions up to 256, and
    has first derivatives only.

    Args:
        query: (N, heads, queries, dim); float32, bfloat16, float16 or float64, of any strides.
        key, value: (N, heads, keys, dim), in the dtype of ``query``. Without keys the result is 0.
        scale: of the logits; None means 1 / sqrt(dim).

    Returns:
        (N, heads, queries, dim) in the dtype of ``query``. From the kernel it lies in memory as (N, queries, heads, dim), so
        that ``out.transpose(1, 2).flatten(2)`` copies nothing; PyTorch's operator chooses its own layout.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit; the message names the tensor.
        TypeError: an argument is no tensor.
    """
    call = _Call(query, key, value, scale)
    try:
        _check(call)
        if is_observed():  # what is exported shall run without this package
            return _run_pytorch(call)
        return choose("attention", IMPLEMENTATIONS, call).run(call)
    except Exception as error:
        explain_refusal("attention", error, {"query": query, "key": key, "value": value}, {}, "scale")
        raise


class _Call(NamedTuple):
    """The arguments of :func:`attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None


def attention_reference(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """The reference by PyTorch's own operator: differentiable, on any device. Arguments as :func:`attention`."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


@torch.library.custom_op("ddim_fast::attention", mutates_args=())
def _registered(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The Triton kernel as autograd and torch.compile see it: the result, and log-sum-exps for the backward pass."""
    from ..kernels.attention import attention

    return attention(query, key, value, scale)


@_registered.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import new_lse, new_output

    return new_output(query), new_lse(query)


@torch.library.custom_op("ddim_fast::attention_backward", mutates_args=())
def _registered_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    from ..kernels.attention import attention_backward

    return attention_backward(grad, query, key, value, out, lse, scale)


@_registered_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.attention import new_output

    return new_output(query), new_output(key), new_output(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_registered_backward(grad, *ctx.saved_tensors, ctx.scale), None


_registered.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.ddim_fast.attention)
def _flops(query_shape: Any, key_shape: Any, value_shape: Any, scale: float, *, out_shape: Any = None) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


@register_flop_formula(torch.ops.ddim_fast.attention_backward)
def _backward_flops(
    grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *rest: Any, out_shape: Any = None
) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


def _run_triton(call: _Call) -> Tensor:
    scale = 1 / math.sqrt(call.query.shape[3]) if call.scale is None else call.scale
    if torch.compiler.is_compiling() or _records_gradient(call):
        return _registered(call.query, call.key, call.value, scale)[0]
    from ..kernels.attention import attention

    return attention(call.query, call.key, call.value, scale)[0]


def _why_not_triton(call: _Call) -> str | None:
    if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {call.query.dtype}"
    if call.query.shape[3] > 256:
        return f"it takes head dimensions up to 256, not {call.query.shape[3]}"
    return why_not_triton(call.query.device)


def _triton_is_faster(call: _Call) -> bool:
    n, heads, queries, dim = call.query.shape
    return (
        call.query.is_cuda
        and not _records_gradient(call)
        and any(
            (call.query.dtype, queries, call.key.shape[2], dim) == (dtype, tokens, tokens, head_dim) and n * heads >= least
            for dtype, tokens, head_dim, least in FASTER_IN_TRITON
        )
    )


def _run_pytorch(call: _Call) -> Tensor:
    return attention_reference(*call[:3], scale=call.scale)


def _why_not_on(device: str, call: _Call) -> str | None:
    actual = call.query.device
    return None if actual.type == device else f"it takes tensors on {device}, not {actual}"


# scaled_dot_product_attention is C++ on a CPU and CUDA on a GPU, and nothing here would improve on it there. So a network whose
# operators are all asked to be native, or all CUDA, finds it under these names, too.
IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, _why_not_triton, _triton_is_faster),
    Implementation("native", _run_pytorch, lambda call: _why_not_on("cpu", call)),
    Implementation("cuda", _run_pytorch, lambda call: _why_not_on("cuda", call)),
    Implementation("reference", _run_pytorch, lambda call: None),
)


def _records_gradient(call: _Call) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in call[:3])


def _check(call: _Call) -> None:
    query, key, value, scale = call
    if query.ndim != 4 or not query.is_floating_point() or query.shape[3] == 0:
        raise ValueError(
            "query must be a floating-point tensor of shape (N, heads, queries, dim); "
            f"got {query.dtype} of shape {tuple(query.shape)}"
        )
    n, heads, _, dim = query.shape
    if key.ndim != 4 or (key.shape[0], key.shape[1], key.shape[3]) != (n, heads, dim):
        raise ValueError(f"key must have shape ({n}, {heads}, keys, {dim}) to fit query; got {tuple(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key, {tuple(key.shape)}; got {tuple(value.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number; got {scale}")
