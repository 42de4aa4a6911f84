"""The fused DDIM update: guidance, clipping, the step and seeded noise in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["ddim_step", "ddim_step_kernel"]

# (up to this many elements, elements a program, warps). Small steps need a program for every multiprocessor; large ones are
# bound by memory and need several 16-byte accesses in flight in each thread.
TUNING = ((1 << 17, 256, 2), (1 << 22, 1024, 4), (float("inf"), 2048, 4))

# With seeds a program stays within one image: the largest power of two that divides the 3 x 32 x 32 values of CIFAR-10.
SEEDED_BLOCK = 1024

TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit(do_not_specialize=["step", "rows"])
def ddim_step_kernel(
    sample_ptr,
    model_output_ptr,
    unconditional_ptr,
    noise_ptr,
    seeds_ptr,
    out_ptr,
    table_ptr,
    step_ptr,
    step,
    rows,
    image_numel,
    blocks_an_image,
    x0_from_sample,
    x0_from_output,
    eps_from_sample,
    eps_from_output,
    prev_from_x0,
    prev_from_eps,
    sigma,
    clip,
    guidance,
    BLOCK: tl.constexpr,
):
    # Absent tensors arrive as None, a compile-time constant; their branches are not compiled.
    image = tl.program_id(0) // blocks_an_image
    first = (tl.program_id(0) % blocks_an_image).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < image_numel
    offsets = image.to(tl.int64) * image_numel + element

    if table_ptr is not None:
        step = tl.load(step_ptr)
        row = table_ptr + 7 * step
        valid = (step >= 0) & (step < rows)  # elsewhere the result is NaN
        x0_from_sample = tl.load(row, mask=valid, other=float("nan"))
        x0_from_output = tl.load(row + 1, mask=valid, other=float("nan"))
        eps_from_sample = tl.load(row + 2, mask=valid, other=float("nan"))
        eps_from_output = tl.load(row + 3, mask=valid, other=float("nan"))
        prev_from_x0 = tl.load(row + 4, mask=valid, other=float("nan"))
        prev_from_eps = tl.load(row + 5, mask=valid, other=float("nan"))
        sigma = tl.load(row + 6, mask=valid, other=float("nan"))

    x = tl.load(sample_ptr + offsets, mask=inside).to(tl.float32)
    m = tl.load(model_output_ptr + offsets, mask=inside).to(tl.float32)
    if unconditional_ptr is not None:
        none = tl.load(unconditional_ptr + offsets, mask=inside).to(tl.float32)
        m = none + guidance * (m - none)

    x0 = x0_from_sample * x + x0_from_output * m
    x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    eps = eps_from_sample * x + eps_from_output * m
    out = prev_from_x0 * x0 + prev_from_eps * eps
    if noise_ptr is not None:
        out += sigma * tl.load(noise_ptr + offsets, mask=inside).to(tl.float32)
    if seeds_ptr is not None:
        out += sigma * _seeded_noise(tl.load(seeds_ptr + image), step, first // 4, BLOCK)
    tl.store(out_ptr + offsets, out, mask=inside)


@triton.jit
def _seeded_noise(seed, step, first_block, BLOCK: tl.constexpr):
    """BLOCK standard normals of an image, from Philox block `first_block` on: ddim_fast.ops.noise.seeded_noise."""
    block = (first_block + tl.arange(0, BLOCK // 4)).to(tl.int32)
    zero = tl.zeros_like(block)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + step.to(tl.int32), zero, zero)
    r0 = tl.sqrt(-2 * _log_of_uniform(w0))
    r1 = tl.sqrt(-2 * _log_of_uniform(w2))
    sin0, cos0 = _sin_cos_of_uniform(w1)
    sin1, cos1 = _sin_cos_of_uniform(w3)
    # Interleaved twice, the four stand in the order 0, 1, 2, 3.
    return tl.interleave(tl.interleave(r0 * cos0, r1 * cos1), tl.interleave(r0 * sin0, r1 * sin1))


@triton.jit
def _log_of_uniform(word):
    """log((word + 0.5) / 2^32) to a few ulp, in fp32. Near 1 the uniform number would have lost its digits to rounding; its
    distance to 1 keeps them, and log1p(-z) = log(v) * -z / (v - 1) with v = 1 - z rounded (Goldberg 1991, theorem 4)."""
    z = ((0xFFFFFFFF - word).to(tl.float32) + 0.5) * 2.0**-32
    v = 1.0 - z
    near_one = tl.where(v == 1.0, -z, tl.log(v) * (-z / tl.where(v == 1.0, 1.0, v - 1.0)))
    return tl.where(word < 0x80000000, tl.log((word.to(tl.float32) + 0.5) * 2.0**-32), near_one)


@triton.jit
def _sin_cos_of_uniform(word):
    """sin and cos of 2 pi (word + 0.5) / 2^32: integers give the quadrant exactly, Taylor's polynomials the rest of the angle,
    within pi/4 of it, to half an ulp."""
    quadrant = (word + 0x20000000) >> 30  # the sum wraps around, as angles do
    rest = (word - (quadrant << 30)).to(tl.int32, bitcast=True)
    a = (rest.to(tl.float32) + 0.5) * (TWO_PI * 2.0**-32)
    s = a * a
    sin = a * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880)))))
    cos = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * (1 / 40320))))
    odd = (quadrant & 1) == 1
    turned_sin, turned_cos = tl.where(odd, cos, sin), tl.where(odd, -sin, cos)
    back = quadrant >= 2
    return tl.where(back, -turned_sin, turned_sin), tl.where(back, -turned_cos, turned_cos)


def ddim_step(
    sample: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: Sequence[float] | torch.Tensor,
    clip: float | None = None,
    noise: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    *,
    unconditional: torch.Tensor | None = None,
    guidance: float = 1.0,
    seeds: torch.Tensor | None = None,
    step: int | torch.Tensor = 0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The DDIM step from x_t and the network's output to x_{t'}, computed in fp32 and rounded once, to the dtype of the result.

        m   = unconditional + guidance * (model_output - unconditional)
        x0  = clamp(p * sample + q * m, -clip, clip)
        eps = r * sample + s * m
        out = u * x0 + v * eps + sigma * noise

    Args:
        sample: x_t; fp32, bf16 or fp16, dense in any order of dimensions (contiguous, with seeds).
        model_output: the network's output; like the other tensors, in sample's shape and strides.
        coefficients: the seven numbers (p, q, r, s, u, v, sigma), or an fp32 table of (S, 7) on the device, of which the kernel
            reads row `step`; a step that is not in it gives NaN.
        clip: bound on |x0|, or None for no bound. NaN stays NaN.
        noise: fresh noise, or None to leave its term out.
        out: the tensor that receives the result, possibly one of the inputs; by default a new tensor like sample.
        unconditional: the network's output without the condition; None leaves the first line out.
        seeds: (N,) int64 on the device: the noise is made in the kernel, see ddim_fast.ops.noise. Instead of noise.
        step: number of the sampling step, for seeds and for the table; with a table, an int64 tensor of one element there.
        out_dtype: of the new tensor.
    """
    if out is None:
        out = torch.empty_like(sample, dtype=out_dtype)
    numel = sample.numel()
    if numel == 0:
        return out
    images = 1 if seeds is None else len(seeds)
    image_numel = numel // images
    block, num_warps = next((block, warps) for limit, block, warps in TUNING if numel <= limit)
    if seeds is not None:
        block, num_warps = SEEDED_BLOCK, 4
    blocks_an_image = triton.cdiv(image_numel, block)
    table = coefficients if isinstance(coefficients, torch.Tensor) else None
    with torch.cuda.device_of(sample):
        ddim_step_kernel[(images * blocks_an_image,)](
            sample,
            model_output,
            unconditional,
            noise,
            seeds,
            out,
            table,
            None if table is None else step,
            0 if table is not None else step,
            0 if table is None else len(table),
            image_numel,
            blocks_an_image,
            *(float(c) for c in (coefficients if table is None else [0.0] * 7)),
            math.inf if clip is None else float(clip),
            float(guidance),
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,  # the same bits as plain fp32 tensor operations in this order
        )
    return out
