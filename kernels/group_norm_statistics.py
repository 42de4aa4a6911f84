"""Group statistics (mean and reciprocal standard deviation), of a tile in registers or merged from an image's chunks.

The merge has a fixed order and no atomics: the same input gives the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm_tiles import Inputs, joined_pointers, load_input, masked, sum_over_groups, tile_coordinates

__all__ = ["chunked_statistics", "group_statistics"]

# Groups and chunks that a program merges at a time.
MERGE = (4, 256)


@triton.jit
def _rounded_quotient(sums, count):
    """sums / count, correctly rounded. Triton's `/` is a product with a reciprocal, which the compiler may fuse with a
    subtraction; the value subtracted would then have more digits than the value stored."""
    if sums.dtype == tl.float64:
        return sums / count
    else:
        return tl.div_rn(sums, tl.full(sums.shape, count, tl.float32))


@triton.jit
def _tile_statistics(v, inside, positions, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE, STORED: tl.constexpr):
    """Each group's provisional mean, its correction, and the sum of squared deviations from the corrected mean, each
    (1, units, 1); and the tile's deviations from the provisional mean. Only if `STORED` may the mean be stored.

    The second pass sums about the provisional mean and corrects both (Chan, Golub and LeVeque 1983). The mean stays in two
    parts, because rounding their sum may cost more digits than a small spread has.
    """
    count = positions * GROUP_SIZE
    sums = sum_over_groups(v, GROUP_SIZE, UNIT, CHANNELS_LAST)
    mean = _rounded_quotient(sums, count) if STORED else sums / count
    d = masked(v - mean, inside, UNIT, WHOLE)
    correction = sum_over_groups(d, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
    squares = sum_over_groups(d * d, GROUP_SIZE, UNIT, CHANNELS_LAST)
    return mean, correction, squares - count * correction * correction, d


@triton.jit
def group_statistics(
    v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
):
    """v less a provisional mean; for each unit the correction of its group's mean, and 1 / sqrt(var + eps)."""
    if statistics_ptr is None:
        _, correction, squares, d = _tile_statistics(v, inside, positions, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE, False)
        rstd = tl.rsqrt(squares / (positions * GROUP_SIZE) + eps)
    else:
        pointers, exists = (statistics_ptr + image * 3 * groups + group)[None, :, None], has_group[None, :, None]
        mean = tl.load(pointers, mask=exists, other=0.0)
        correction = tl.load(pointers + groups, mask=exists, other=0.0)
        rstd = tl.load(pointers + 2 * groups, mask=exists, other=0.0)
        d = v - mean
    return d, correction, rstd


@triton.jit
def chunk_statistics_kernel(
    x_ptr,
    skip_ptr,
    pre_shift_ptr,
    partials_ptr,
    pre_shift_stride,
    x_channels,
    skip_channels,
    positions,
    groups,
    blocks,
    chunks,
    CHANNELS_LAST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The statistics of each chunk, from :func:`_tile_statistics`, stored as (images, chunks, 3, groups)."""
    image, chunk, group, has_group, c, p, has_channel, inside = tile_coordinates(
        blocks, chunks, x_channels + skip_channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = load_input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    size = tl.minimum(positions - chunk * BLOCK_P, BLOCK_P)
    mean, correction, squares, _ = _tile_statistics(v, inside, size, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE, True)
    pointers = (partials_ptr + (image * chunks + chunk) * 3 * groups + group)[None, :, None]
    exists = has_group[None, :, None]
    tl.store(pointers, mean, mask=exists)
    tl.store(pointers + groups, correction, mask=exists)
    tl.store(pointers + 2 * groups, squares, mask=exists)


@triton.jit
def _partial_statistics(partials_ptr, image, chunks, first, group, groups, positions, GROUP_SIZE, BLOCK_P, ROWS: tl.constexpr):
    """The next `ROWS` chunks' statistics: pointers, mask, and the number of elements in each chunk."""
    chunk = first + tl.arange(0, ROWS)[:, None]
    size = tl.minimum(positions - chunk * BLOCK_P, BLOCK_P) * GROUP_SIZE
    pointers = partials_ptr + (image * chunks + chunk) * 3 * groups + group[None, :]
    return pointers, (chunk < chunks) & (group < groups)[None, :], size


@triton.jit
def merge_kernel(
    partials_ptr,
    statistics_ptr,
    positions,
    groups,
    chunks,
    eps,
    GROUP_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the chunks' statistics into each image's provisional mean, its correction and 1 / sqrt(var + eps), stored as
    (images, 3, groups). Two passes over the chunks' means."""
    blocks = tl.cdiv(groups, GROUPS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)
    count = positions * GROUP_SIZE
    mean = tl.zeros([GROUPS], partials_ptr.dtype.element_ty)
    for first in range(0, chunks, ROWS):
        pointers, inside, size = _partial_statistics(
            partials_ptr, image, chunks, first, group, groups, positions, GROUP_SIZE, BLOCK_P, ROWS
        )
        mean += tl.sum(size * tl.load(pointers, mask=inside, other=0.0), axis=0)
    mean = _rounded_quotient(mean, count)
    deviations = tl.zeros_like(mean)
    squares = tl.zeros_like(mean)
    for first in range(0, chunks, ROWS):
        pointers, inside, size = _partial_statistics(
            partials_ptr, image, chunks, first, group, groups, positions, GROUP_SIZE, BLOCK_P, ROWS
        )
        d = tl.load(pointers, mask=inside, other=0.0) - mean[None, :]
        d = tl.where(inside, d + tl.load(pointers + groups, mask=inside, other=0.0), 0.0)
        deviations += tl.sum(size * d, axis=0)
        squares += tl.sum(tl.load(pointers + 2 * groups, mask=inside, other=0.0) + size * d * d, axis=0)
    correction = deviations / count
    squares -= count * correction * correction
    pointers = statistics_ptr + image * 3 * groups + group
    tl.store(pointers, mean, mask=group < groups)
    tl.store(pointers + groups, correction, mask=group < groups)
    tl.store(pointers + 2 * groups, tl.rsqrt(squares / count + eps), mask=group < groups)


def chunked_statistics(inputs: Inputs, eps: float) -> torch.Tensor | None:
    """The statistics of each image, (images, 3, groups), or None where a tile is a whole image."""
    geometry, images = inputs.geometry, len(inputs.x)
    if geometry.chunks == 1:
        return None
    options = {"dtype": inputs.accumulator, "device": inputs.x.device}
    partials = torch.empty(images, geometry.chunks, 3, geometry.num_groups, **options)
    statistics = torch.empty(images, 3, geometry.num_groups, **options)
    pre_shift, stride = inputs.per_channel[2], inputs.strides[0]
    chunk_statistics_kernel[inputs.grid](
        inputs.x, inputs.skip, pre_shift, partials, stride, *geometry.sizes, **geometry.options
    )
    groups, rows = MERGE
    merge_kernel[(images * triton.cdiv(geometry.num_groups, groups),)](
        partials,
        statistics,
        geometry.positions,
        geometry.num_groups,
        geometry.chunks,
        eps,
        GROUP_SIZE=geometry.options["GROUP_SIZE"],
        BLOCK_P=geometry.options["BLOCK_P"],
        GROUPS=groups,
        ROWS=rows,
    )
    return statistics
