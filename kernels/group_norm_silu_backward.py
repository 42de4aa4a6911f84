"""The backward pass of group_norm_silu; it recomputes the statistics from the inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .group_norm_silu import gain_and_bias, sigmoid
from .group_norm_statistics import chunked_statistics, group_statistics
from .group_norm_tiles import (
    BACKWARD,
    Inputs,
    joined_pointers,
    load_input,
    load_per_channel,
    load_tile,
    masked,
    store_per_channel,
    store_tile,
    sum_over_groups,
    sum_over_positions,
    tile_coordinates,
    tile_pointers,
    to_accumulator,
)

__all__ = ["Gradients", "group_norm_silu_backward"]

# Images and channels whose sums a program adds.
TOTAL = (128, 16)


@triton.jit
def group_norm_silu_backward_kernel(
    grad_ptr,
    x_ptr,
    skip_ptr,
    weight_ptr,
    bias_ptr,
    pre_shift_ptr,
    scale_ptr,
    shift_ptr,
    statistics_ptr,
    sums_ptr,
    x_grad_ptr,
    skip_grad_ptr,
    pre_shift_grad_ptr,
    pre_shift_stride,
    scale_stride,
    shift_stride,
    x_channels,
    skip_channels,
    positions,
    groups,
    blocks,
    chunks,
    eps,
    SILU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    channels = x_channels + skip_channels
    image, chunk, group, has_group, c, p, has_channel, inside = tile_coordinates(
        blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = load_input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    # Both loads are under way before anything waits for one.
    pointers = tile_pointers(grad_ptr, image, c, p, channels, positions, CHANNELS_LAST)
    grad = load_tile(pointers, inside, UNIT, WHOLE)
    d, correction, rstd = group_statistics(
        v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
    )
    gain, bias = gain_and_bias(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT
    )
    normalised = (d - correction) * rstd
    dy = to_accumulator(grad)  # y = normalised * gain + bias
    if SILU:
        y = normalised * gain + bias
        s = sigmoid(y)
        dy *= s * (1.0 + y * (1.0 - s))

    # The other gradients follow from two sums over the positions. Where a tile is a whole image, they are its own sums;
    # otherwise a first launch writes each chunk's sums, and a second one reads their totals.
    if statistics_ptr is None or x_grad_ptr is None:
        dy_sum, product_sum = sum_over_positions(dy), sum_over_positions(dy * normalised)
        first = sums_ptr + (image * chunks + chunk) * 2 * channels
        store_per_channel(first, c, dy_sum, has_channel)
        store_per_channel(first + channels, c, product_sum, has_channel)
    else:
        first = sums_ptr + image * 2 * channels
        dy_sum = load_per_channel(first, c, has_channel, UNIT)
        product_sum = load_per_channel(first + channels, c, has_channel, UNIT)

    if x_grad_ptr is not None:
        # Project out the components of the gradient that move a group's mean or its spread.
        count = positions * GROUP_SIZE
        mean_part = sum_over_groups(gain * dy_sum, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
        spread_part = sum_over_groups(gain * product_sum, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
        dv = (dy * gain - mean_part - normalised * spread_part) * rstd
        pointers = joined_pointers(x_grad_ptr, skip_grad_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
        store_tile(pointers, dv, inside, WHOLE)
        if pre_shift_grad_ptr is not None:
            first = pre_shift_grad_ptr + (image * chunks + chunk) * channels
            store_per_channel(first, c, sum_over_positions(masked(dv, inside, UNIT, WHOLE)), has_channel)


@triton.jit
def totals_kernel(sums_ptr, bias_grad_ptr, weight_grad_ptr, images, channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The gradients of bias and weight: (images, 2, channels) summed over the images, in a fixed order."""
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)  # with 2**30 channels in all images together, offsets reach 2**31
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dy_sums = tl.zeros([ROWS, BLOCK_C], sums_ptr.dtype.element_ty)
    product_sums = tl.zeros_like(dy_sums)
    for first in range(0, images, ROWS):
        pointers = sums_ptr + (first + row) * 2 * channels + c[None, :]
        inside = (first + row < images) & (c < channels)[None, :]
        dy_sums += tl.load(pointers, mask=inside, other=0.0)
        product_sums += tl.load(pointers + channels, mask=inside, other=0.0)
    tl.store(bias_grad_ptr + c, tl.sum(dy_sums, axis=0), mask=c < channels)
    tl.store(weight_grad_ptr + c, tl.sum(product_sums, axis=0), mask=c < channels)


class Gradients(NamedTuple):
    """The gradients of the inputs of :func:`group_norm_silu`; None for an absent input."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    pre_shift: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    skip: torch.Tensor | None


def group_norm_silu_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    pre_shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> Gradients:
    """The gradients of :func:`group_norm_silu`, each in the dtype of its input, given that of the result. The residual's is
    ``grad`` itself.

    The statistics are recomputed, so the forward pass saves nothing but its inputs.
    """
    inputs = Inputs(x, num_groups, weight, bias, pre_shift, scale, shift, skip, BACKWARD)
    geometry = inputs.geometry
    grad = inputs.in_format(grad)
    x_grad = inputs.empty_image(x.shape[1])
    skip_grad = None if skip is None else inputs.empty_image(skip.shape[1])
    options = {"dtype": inputs.accumulator, "device": x.device}
    allocate = torch.empty if grad.numel() > 0 else torch.zeros
    sums = allocate(len(x), geometry.chunks, 2, geometry.channels, **options)
    pre_shift_grad = None
    if pre_shift is not None:
        parts = options if geometry.chunks > 1 else {**options, "dtype": pre_shift.dtype}
        pre_shift_grad = allocate(len(x), geometry.chunks, geometry.channels, **parts)
    if grad.numel() > 0:
        arrays = (grad, inputs.x, inputs.skip, *inputs.per_channel)
        rest = (*inputs.strides, *geometry.sizes, eps, silu)
        with torch.cuda.device_of(x):
            statistics = chunked_statistics(inputs, eps)
            if statistics is not None:
                group_norm_silu_backward_kernel[inputs.grid](
                    *arrays, statistics, sums, None, None, None, *rest, **geometry.options
                )
                sums = sums.sum(dim=1, keepdim=True)
            group_norm_silu_backward_kernel[inputs.grid](
                *arrays, statistics, sums, x_grad, skip_grad, pre_shift_grad, *rest, **geometry.options
            )

    sums = sums[:, 0]  # over the positions, of dy and of dy * normalised: (images, 2, channels)
    scale_grad = shift_grad = None
    if scale is not None:
        scale_grad = (weight * sums[:, 1] + bias * sums[:, 0]).to(scale.dtype)
    if shift is not None:
        shift_grad = sums[:, 0].to(shift.dtype, copy=True)
    if scale is not None:
        sums = sums * (1 + scale.to(inputs.accumulator))[:, None]
    if pre_shift is not None:
        pre_shift_grad = pre_shift_grad[:, 0] if geometry.chunks == 1 else pre_shift_grad.sum(1).to(pre_shift.dtype)
    bias_grad, weight_grad = (torch.empty(geometry.channels, dtype=t.dtype, device=x.device) for t in (bias, weight))
    rows, block_c = TOTAL
    with torch.cuda.device_of(x):
        totals_kernel[triton.cdiv(geometry.channels, block_c),](
            sums, bias_grad, weight_grad, len(x), geometry.channels, ROWS=rows, BLOCK_C=block_c
        )
    return Gradients(x_grad, weight_grad, bias_grad, pre_shift_grad, scale_grad, shift_grad, skip_grad)
