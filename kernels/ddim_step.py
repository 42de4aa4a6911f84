"""One DDIM update in a single pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["ddim_step", "ddim_step_kernel"]

# (up to this many elements, elements a program, warps). Small steps need programs for every multiprocessor more than
# they need long ones; large ones are bound by memory and want several 16-byte accesses in flight in each thread.
TUNING = ((1 << 17, 256, 2), (1 << 22, 1024, 4), (float("inf"), 2048, 4))


@triton.jit
def ddim_step_kernel(
    sample_ptr,
    model_output_ptr,
    noise_ptr,
    out_ptr,
    numel,
    x0_from_sample,
    x0_from_output,
    eps_from_sample,
    eps_from_output,
    prev_from_x0,
    prev_from_eps,
    sigma,
    clip,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: the last program's offsets may pass 2**31.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    x = tl.load(sample_ptr + offsets, mask=inside).to(tl.float32)
    m = tl.load(model_output_ptr + offsets, mask=inside).to(tl.float32)

    x0 = x0_from_sample * x + x0_from_output * m
    x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    eps = eps_from_sample * x + eps_from_output * m
    out = prev_from_x0 * x0 + prev_from_eps * eps
    if HAS_NOISE:
        out += sigma * tl.load(noise_ptr + offsets, mask=inside).to(tl.float32)
    tl.store(out_ptr + offsets, out, mask=inside)


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float],
    clip: float | None = None,
    noise: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_t and the network's output -> x_{t'}, computed in fp32 and rounded once, to the dtype of `out`.

        x0  = clamp(p * sample + q * model_output, -clip, clip)
        eps = r * sample + s * model_output
        out = u * x0 + v * eps + sigma * noise

    Args:
        sample: x_t; fp32, bf16 or fp16, dense in any order of dimensions.
        model_output: what the network returned; like the other tensors, in sample's shape and strides.
        coefficients: the seven numbers (p, q, r, s, u, v, sigma).
        clip: bound on |x0|, or None for no bound. NaN stays NaN.
        noise: fresh noise, or None to leave its term out.
        out: where the result goes, possibly one of the inputs; by default a new tensor like sample.
    """
    if len(coefficients) != 7:
        raise ValueError(f"coefficients has {len(coefficients)} values instead of 7")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}, but must be positive, or None for no clipping")
    if out is None:
        out = torch.empty_like(sample)
    _check_tensors(sample=sample, model_output=model_output, noise=noise, out=out)

    numel = sample.numel()
    if numel == 0:
        return out
    block, num_warps = next((block, warps) for limit, block, warps in TUNING if numel <= limit)
    with torch.cuda.device_of(sample):
        ddim_step_kernel[(triton.cdiv(numel, block),)](
            sample,
            model_output,
            noise,
            out,
            numel,
            *(float(c) for c in coefficients),
            float("inf") if clip is None else float(clip),
            HAS_NOISE=noise is not None,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,  # the same bits as plain fp32 tensor operations in this order
        )
    return out


def _check_tensors(sample: torch.Tensor, **others: torch.Tensor | None) -> None:
    if not torch.ops.aten.is_non_overlapping_and_dense(sample):
        raise ValueError(f"sample must be dense, but has shape {tuple(sample.shape)} and strides {sample.stride()}")
    tensors = {"sample": sample} | {name: tensor for name, tensor in others.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {tensor.dtype}, but must be float32, bfloat16 or float16")
        if tensor.device != sample.device:
            raise ValueError(f"{name} is on {tensor.device}, but sample is on {sample.device}")
        if tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but sample has {tuple(sample.shape)}")
        if _strides(tensor) != _strides(sample):
            raise ValueError(f"{name} has strides {tensor.stride()}, but sample has {sample.stride()}")


def _strides(tensor: torch.Tensor) -> list[int]:
    """The strides that matter: where a dimension has one element, equal layouts may differ in its stride."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
