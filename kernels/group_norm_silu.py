"""GroupNorm, SiLU and the additions of a U-Net's residual block in one pass over an image.

Images larger than a tile (group_norm_tiles.py) are read twice: one kernel writes each chunk's statistics, one merges them in a
fixed order (group_norm_statistics.py), and one normalises. The gradients are in group_norm_silu_backward.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .group_norm_statistics import chunked_statistics, group_statistics
from .group_norm_tiles import (
    FORWARD,
    Inputs,
    joined_pointers,
    load_input,
    load_per_channel,
    load_tile,
    store_tile,
    tile_coordinates,
    tile_pointers,
    to_accumulator,
)

__all__ = ["gain_and_bias", "group_norm_silu", "sigmoid"]

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def gain_and_bias(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT):
    """The per-channel gain and bias of y = normalised * gain + bias, FiLM included."""
    gain = load_per_channel(weight_ptr, c, has_channel, UNIT)
    bias = load_per_channel(bias_ptr, c, has_channel, UNIT)
    if scale_ptr is not None:
        scale = 1.0 + load_per_channel(scale_ptr + image * scale_stride, c, has_channel, UNIT)
        gain *= scale
        bias *= scale
    if shift_ptr is not None:
        bias += load_per_channel(shift_ptr + image * shift_stride, c, has_channel, UNIT)
    return gain, bias


@triton.jit
def sigmoid(y):
    if y.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-y))
    else:
        return 1.0 / (1.0 + tl.exp2(y * -LOG2E))  # without tl.exp's care for denormal results, to which 1 is added


@triton.jit
def group_norm_silu_kernel(
    x_ptr,
    skip_ptr,
    residual_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    pre_shift_ptr,
    scale_ptr,
    shift_ptr,
    statistics_ptr,
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
    image, _, group, has_group, c, p, has_channel, inside = tile_coordinates(
        blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = load_input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    d, correction, rstd = group_statistics(
        v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
    )
    gain, bias = gain_and_bias(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT
    )
    gain *= rstd
    y = d * gain + (bias - correction * gain)
    if SILU:
        y *= sigmoid(y)
    if residual_ptr is not None:
        pointers = tile_pointers(residual_ptr, image, c, p, channels, positions, CHANNELS_LAST)
        y += to_accumulator(load_tile(pointers, inside, UNIT, WHOLE))
    store_tile(tile_pointers(out_ptr, image, c, p, channels, positions, CHANNELS_LAST), y, inside, WHOLE)


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    pre_shift: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(norm(concat(x, skip) + pre_shift) * (1 + scale) + shift) + residual.

    Arguments and result are those of :func:`ddim_fast.ops.group_norm_silu.group_norm_silu`, which checks them. Images that are
    not in the memory format of ``x`` are copied first.
    """
    inputs = Inputs(x, num_groups, weight, bias, pre_shift, scale, shift, skip, FORWARD)
    residual = inputs.in_format(residual)
    out = inputs.empty_image(inputs.geometry.channels)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        group_norm_silu_kernel[inputs.grid](
            inputs.x,
            inputs.skip,
            residual,
            out,
            *inputs.per_channel,
            chunked_statistics(inputs, eps),
            *inputs.strides,
            *inputs.geometry.sizes,
            eps,
            silu,
            **inputs.geometry.options,
        )
    return out
