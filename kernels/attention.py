"""Fused scaled dot-product attention, forward and backward: the attention matrix stays on the chip.

The forward pass is an online softmax over blocks of keys, with running maxima and sums. The backward pass recomputes the
weights from the saved log-sum-exp. Dao et al. 2022 (FlashAttention), Dao 2023.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "attention",
    "attention_backward",
    "attention_dkdv_kernel",
    "attention_dq_kernel",
    "attention_kernel",
    "new_lse",
    "new_output",
]

# Compute capabilities with 227 KiB of shared memory a block. The rows for the others fit the 99 KiB of 8.6, 8.9 and 12.0.
LARGE_CHIPS = (90, 100, 103)

ANY = math.inf

# (bytes an element, large chips only, largest head dimension, most queries and keys, queries and keys a block, warps, stages);
# the first row that fits is used. The rows are fixed, not timed at first use: timing could choose, and round, differently on
# another run, and is impossible while a CUDA graph is captured. Tensor cores multiply 16-bit numbers; Hopper's need 64 rows
# for every four warps. fp32 stays exact, without tensor cores; a thread then holds whole rows, so blocks are small. fp64 is for
# checking gradients.
FORWARD = (
    (2, False, 128, 16, 16, 16, 1, 2),
    (2, False, 256, 16, 16, 16, 2, 2),
    (2, False, 128, 64, 64, 32, 4, 2),
    (2, True, 256, 64, 64, 32, 4, 2),
    (2, False, 64, ANY, 128, 64, 8, 3),
    (2, False, 128, ANY, 128, 32, 8, 3),
    (2, True, 256, ANY, 128, 32, 8, 3),
    (2, False, 256, ANY, 64, 32, 8, 2),
    (4, False, 64, ANY, 32, 32, 4, 2),
    (4, False, 256, ANY, 16, 16, 8, 2),
    (8, False, 256, ANY, 16, 16, 4, 1),
)
DQ = (
    (2, False, 128, ANY, 64, 64, 4, 2),
    (2, True, 256, ANY, 64, 64, 8, 2),
    (2, False, 256, ANY, 32, 32, 8, 2),
    (4, False, 64, ANY, 32, 32, 4, 2),
    (4, False, 256, ANY, 16, 16, 4, 2),
    (8, False, 256, ANY, 16, 16, 4, 1),
)
DKDV = (
    (2, False, 64, ANY, 32, 64, 4, 2),
    (2, False, 128, ANY, 64, 64, 8, 2),
    (2, True, 256, ANY, 32, 64, 8, 2),
    (2, False, 256, ANY, 32, 32, 8, 2),
    (4, False, 256, ANY, 16, 16, 4, 2),
    (8, False, 256, ANY, 16, 16, 4, 1),
)


@triton.jit
def _program_coordinates(blocks, heads, BLOCK: tl.constexpr):
    """The image, head and rows of this program. Programs of one head are neighbours, so its keys and values stay in the L2
    cache."""
    program = tl.program_id(0)
    head = program // blocks
    rows = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), rows


@triton.jit
def _pointers(base, image, head, rows, strides, BLOCK_D: tl.constexpr):
    # 64 bits: offsets may pass 2**31.
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    base += image * strides[0] + head * strides[1]
    return base + rows.to(tl.int64)[:, None] * strides[2] + dims[None, :] * strides[3]


@triton.jit
def _advance(pointers, strides, BLOCK: tl.constexpr):
    """The pointers to the next block of rows."""
    return pointers + tl.full((), BLOCK, tl.int64) * strides[2]


@triton.jit
def _row_mask(rows, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    return (rows < num_rows)[:, None] & (tl.arange(0, BLOCK_D) < DIM)[None, :]


@triton.jit
def _load(pointers, rows, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """Rows of one head, with zeros beyond the last one and beyond the head dimension."""
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=_row_mask(rows, num_rows, DIM, BLOCK_D), other=0.0)


@triton.jit
def _store(base, image, head, rows, num_rows, strides, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    pointers = _pointers(base, image, head, rows, strides, BLOCK_D)
    values = values.to(base.dtype.element_ty)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=_row_mask(rows, num_rows, DIM, BLOCK_D))


@triton.jit
def _load_per_row(pointers, rows, num_rows, other: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=rows < num_rows, other=other)


@triton.jit
def _store_per_row(pointers, rows, num_rows, values, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=rows < num_rows)


@triton.jit
def _dot(a, b, acc):
    # fp32 means fp32: the default would round the inputs to TF32.
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_log2e,
    heads,
    queries,
    keys,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):
    image, head, rows = _program_coordinates(tl.cdiv(queries, BLOCK_M), heads, BLOCK_M)
    q = _load(_pointers(q_ptr, image, head, rows, q_strides, BLOCK_D), rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    maximum = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    k_pointers = _pointers(k_ptr, image, head, tl.arange(0, BLOCK_N), k_strides, BLOCK_D)
    v_pointers = _pointers(v_ptr, image, head, tl.arange(0, BLOCK_N), v_strides, BLOCK_D)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load(k_pointers, columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC)) * scale_log2e
        if not WHOLE_KEYS:
            s = tl.where((columns < keys)[None, :], s, float("-inf"))
        higher = tl.maximum(maximum, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_pointers, columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
        acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
        maximum = higher
        k_pointers = _advance(k_pointers, k_strides, BLOCK_N)
        v_pointers = _advance(v_pointers, v_strides, BLOCK_N)

    # Without keys the sum is empty and the result 0; otherwise the largest logit has put a 1 into it.
    out = acc / tl.where(total == 0, 1, total)[:, None]
    _store(out_ptr, image, head, rows, queries, out_strides, out, DIM, BLOCK_D, WHOLE_QUERIES)
    row_numbers = (image * heads + head) * queries + rows
    _store_per_row(lse_ptr + row_numbers, rows, queries, maximum + tl.log2(total), WHOLE_QUERIES)


@triton.jit
def attention_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    scale,
    scale_log2e,
    heads,
    queries,
    keys,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    dq_strides,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):
    """The gradient of the queries, and delta = rowsum(grad * out) for attention_dkdv_kernel."""
    image, head, rows = _program_coordinates(tl.cdiv(queries, BLOCK_M), heads, BLOCK_M)
    row_numbers = (image * heads + head) * queries + rows
    grad = _load(_pointers(grad_ptr, image, head, rows, grad_strides, BLOCK_D), rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
    out = _load(_pointers(out_ptr, image, head, rows, out_strides, BLOCK_D), rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
    delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
    _store_per_row(delta_ptr + row_numbers, rows, queries, delta, WHOLE_QUERIES)

    q = _load(_pointers(q_ptr, image, head, rows, q_strides, BLOCK_D), rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
    lse = _load_per_row(lse_ptr + row_numbers, rows, queries, float("inf"), WHOLE_QUERIES)
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    k_pointers = _pointers(k_ptr, image, head, tl.arange(0, BLOCK_N), k_strides, BLOCK_D)
    v_pointers = _pointers(v_ptr, image, head, tl.arange(0, BLOCK_N), v_strides, BLOCK_D)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load(k_pointers, columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), ACC)) * scale_log2e
        p = tl.exp2(s - lse[:, None])
        if not WHOLE_KEYS:
            p = tl.where((columns < keys)[None, :], p, 0)
        v = _load(v_pointers, columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
        dp = _dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), ACC))
        ds = p * (dp - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
        k_pointers = _advance(k_pointers, k_strides, BLOCK_N)
        v_pointers = _advance(v_pointers, v_strides, BLOCK_N)
    _store(dq_ptr, image, head, rows, queries, dq_strides, dq * scale, DIM, BLOCK_D, WHOLE_QUERIES)


@triton.jit
def attention_dkdv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    scale_log2e,
    heads,
    queries,
    keys,
    grad_strides,
    q_strides,
    k_strides,
    v_strides,
    dk_strides,
    dv_strides,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    WHOLE_QUERIES: tl.constexpr,
    WHOLE_KEYS: tl.constexpr,
):
    """The gradients of the keys and values. Everything is transposed, keys by queries: the weights are then the left factor
    of both products, which tensor cores take from registers."""
    image, head, columns = _program_coordinates(tl.cdiv(keys, BLOCK_N), heads, BLOCK_N)
    k = _load(_pointers(k_ptr, image, head, columns, k_strides, BLOCK_D), columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
    v = _load(_pointers(v_ptr, image, head, columns, v_strides, BLOCK_D), columns, keys, DIM, BLOCK_D, WHOLE_KEYS)
    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    q_pointers = _pointers(q_ptr, image, head, tl.arange(0, BLOCK_M), q_strides, BLOCK_D)
    grad_pointers = _pointers(grad_ptr, image, head, tl.arange(0, BLOCK_M), grad_strides, BLOCK_D)
    lse_pointers = lse_ptr + (image * heads + head) * queries + tl.arange(0, BLOCK_M)
    delta_pointers = delta_ptr + (image * heads + head) * queries + tl.arange(0, BLOCK_M)
    for start in range(0, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = _load(q_pointers, rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
        s = _dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), ACC)) * scale_log2e
        # Weights of 0 beyond the last query.
        lse = _load_per_row(lse_pointers, rows, queries, float("inf"), WHOLE_QUERIES)
        p = tl.exp2(s - lse[None, :])
        grad = _load(grad_pointers, rows, queries, DIM, BLOCK_D, WHOLE_QUERIES)
        dv = _dot(p.to(grad.dtype), grad, dv)
        dp = _dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), ACC))
        delta = _load_per_row(delta_pointers, rows, queries, 0.0, WHOLE_QUERIES)
        ds = p * (dp - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
        q_pointers = _advance(q_pointers, q_strides, BLOCK_M)
        grad_pointers = _advance(grad_pointers, grad_strides, BLOCK_M)
        lse_pointers += BLOCK_M
        delta_pointers += BLOCK_M
    _store(dk_ptr, image, head, columns, keys, dk_strides, dk * scale, DIM, BLOCK_D, WHOLE_KEYS)
    _store(dv_ptr, image, head, columns, keys, dv_strides, dv, DIM, BLOCK_D, WHOLE_KEYS)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query key^T scale) value, and the log-sum-exp for :func:`attention_backward`. Logits, weights and sums are fp32.

    Args:
        query: (N, heads, queries, dim) with dim from 1 to 256; fp32, bf16 or fp16, of any strides. fp64 is computed in fp64
            but for the scale, which is rounded to fp32.
        key, value: (N, heads, keys, dim), like query. Without keys the result is 0.
        scale: of the logits.

    Returns:
        (N, heads, queries, dim) in the dtype of query, lying in memory as (N, queries, heads, dim), and (N, heads, queries):
        the base-2 logarithms of the softmax's denominators, fp32 (fp64 for fp64).
    """
    n, heads, queries, _ = _check_tensors(query, key, value)
    out, lse = new_output(query), new_lse(query)
    with torch.cuda.device_of(query):
        options = _options(FORWARD, query, key)
        blocks = n * heads * triton.cdiv(queries, options["BLOCK_M"])
        if blocks:
            attention_kernel[(blocks,)](
                *(query, key, value, out, lse),
                scale * math.log2(math.e),
                *(heads, queries, key.shape[2]),
                *(query.stride(), key.stride(), value.stride(), out.stride()),
                **options,
            )
    return out, lse


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value.

    Args:
        grad: the gradient of ``out``, in its shape and dtype, of any strides.
        query, key, value, scale: the arguments of :func:`attention`.
        out, lse: its results.

    Returns:
        tensors like query, key and value, lying in memory as (N, tokens, heads, dim).
    """
    n, heads, queries, _ = _check_tensors(query, key, value, grad=grad, out=out)
    keys = key.shape[2]
    dq, dk, dv, delta = new_output(query), new_output(key), new_output(value), new_lse(query)
    if lse.shape != delta.shape or lse.dtype != delta.dtype or lse.device != delta.device or not lse.is_contiguous():
        raise ValueError(f"lse must come from attention; got {lse.dtype} of shape {tuple(lse.shape)}")
    scales = (float(scale), scale * math.log2(math.e))
    with torch.cuda.device_of(query):
        options = _options(DQ, query, key)
        blocks = n * heads * triton.cdiv(queries, options["BLOCK_M"])
        if blocks:
            attention_dq_kernel[(blocks,)](
                *(grad, query, key, value, out, lse, delta, dq),
                *scales,
                *(heads, queries, keys),
                *(t.stride() for t in (grad, query, key, value, out, dq)),
                **options,
            )
        options = _options(DKDV, query, key)
        blocks = n * heads * triton.cdiv(keys, options["BLOCK_N"])
        if blocks:
            attention_dkdv_kernel[(blocks,)](
                *(grad, query, key, value, lse, delta, dk, dv),
                *scales,
                *(heads, queries, keys),
                *(t.stride() for t in (grad, query, key, value, dk, dv)),
                **options,
            )
    return dq, dk, dv


def new_output(like: torch.Tensor) -> torch.Tensor:
    """An uninitialised (N, heads, tokens, dim), laid out as (N, tokens, heads, dim) for the linear layer that follows."""
    n, heads, tokens, dim = like.shape
    return torch.empty((n, tokens, heads, dim), dtype=like.dtype, device=like.device).transpose(1, 2)


def new_lse(query: torch.Tensor) -> torch.Tensor:
    """An uninitialised (N, heads, queries) in the dtype of the sums: float32, or float64 for float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.empty(query.shape[:3], dtype=dtype, device=query.device)


def _options(tuning: tuple[tuple[Any, ...], ...], query: torch.Tensor, key: torch.Tensor) -> dict[str, Any]:
    """The kernels' compile-time constants, with the block sizes of the first row of ``tuning`` that fits."""
    dim, tokens = query.shape[3], max(query.shape[2], key.shape[2])
    # Triton's interpreter has no target chip.
    large = not triton.knobs.runtime.interpret and triton.runtime.driver.active.get_current_target().arch in LARGE_CHIPS
    block_m, block_n, num_warps, num_stages = next(
        row
        for size, only_large, largest_dim, most_tokens, *row in tuning
        if size == query.element_size() and large >= only_large and dim <= largest_dim and tokens <= most_tokens
    )
    block_d = max(16, triton.next_power_of_2(dim))  # the least that tl.dot takes
    return {
        "DIM": dim,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "ACC": tl.float64 if query.dtype == torch.float64 else tl.float32,
        # Tiles without padding need no masks.
        "WHOLE_QUERIES": dim == block_d and query.shape[2] % block_m == 0,
        "WHOLE_KEYS": dim == block_d and key.shape[2] % block_n == 0,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **outputs: torch.Tensor
) -> tuple[int, int, int, int]:
    """Raises ValueError, naming the tensor, where shapes, dtypes or devices differ; returns the shape of ``query``."""
    if query.ndim != 4 or query.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"query must be a floating-point tensor of 4 dimensions; got {query.dtype} of {tuple(query.shape)}")
    n, heads, queries, dim = query.shape
    if not 1 <= dim <= 256:
        raise ValueError(f"query has head dimension {dim}, but must have 1 to 256")
    keys = key.shape[2] if key.ndim == 4 else 0
    expected = {"key": (key, keys), "value": (value, keys)} | {name: (t, queries) for name, t in outputs.items()}
    for name, (tensor, tokens) in expected.items():
        if tensor.shape != (n, heads, tokens, dim):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must have {(n, heads, tokens, dim)}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but query is {query.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, but query is on {query.device}")
    return n, heads, queries, dim
