"""GroupNorm, SiLU and what stands around them in a U-Net, forward and backward.

A tile is `BLOCK_P` positions of one image by `BLOCK_C` channels, of which the first `GROUPS * GROUP_SIZE` are in use: whole
groups. `UNIT`, the largest power of two that divides a group, makes units of its channels: mostly the group is one unit.
Where all positions of an image fit one tile, a program holds it in registers from the first sum to the result, and
memory is read once and written once. Larger images are cut into chunks of positions and read twice: one kernel writes each
chunk's statistics, one merges them in a fixed order, and one normalises.

Tiles depend on the shape of one image only, never on the number of images, so an image has the same bits in every batch.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["Gradients", "group_norm_silu", "group_norm_silu_backward", "why_not_group"]

# (up to this many elements a tile, warps). A thread has 32 or 64 elements, in the backward pass, which holds two tiles, too: an
# H100 was fastest so. The last entry is the largest tile that a multiprocessor holds; a quarter of it leaves room for other
# programs, which read while this one computes.
FORWARD = ((2048, 2), (4096, 4), (8192, 4), (16384, 8), (32768, 16))
BACKWARD = ((2048, 2), (4096, 4), (8192, 4), (16384, 8))

# Bytes of a tile's rows in a channels_last image: whole 16-byte accesses, at least a sector of 32 bytes, and up to 64 where
# that costs nothing.
ROW = 64
SECTOR = 32
ACCESS = 16

# Rows of so many bytes cost less than reading an image twice.
NARROWEST = 24

# Tiles of fewer elements get more groups.
SMALL = 2048

# The widest group, in channels, and the most units of a tile whose groups have several: their sums are added over a matrix of
# units by units. With 256 units that takes Triton 3.7 up to a minute to compile, and registers spill; 2048 exceed its largest
# tensor.
MOST_CHANNELS = 1 << 14
MOST_UNITS = 128

# Groups and chunks that a program merges at a time; images and channels whose sums it adds.
MERGE = (4, 256)
TOTAL = (128, 16)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _place(blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image and the chunk of this program; the group of each unit, and whether it exists; the channels and positions, and
    which of them exist. Programs that share the rows of a channels_last image are neighbours, so that what one leaves of a
    cache line the next finds in the cache."""
    program = tl.program_id(0)
    chunk = program // blocks % chunks
    image = (program // blocks // chunks).to(tl.int64)
    first = program % blocks * GROUPS
    member = tl.arange(0, BLOCK_C // UNIT) // (GROUP_SIZE // UNIT)
    lane = tl.arange(0, BLOCK_C)
    c = first * GROUP_SIZE + lane
    p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    has_channel = (lane < GROUPS * GROUP_SIZE) & (c < channels)
    inside = (p < positions)[:, None] & has_channel[None, :]
    return image, chunk, first + member, (member < GROUPS) & (first + member < groups), c, p, has_channel, inside


@triton.jit
def _pointers(ptr, image, c, p, channels, positions, CHANNELS_LAST):
    first = ptr + image * channels * positions
    if CHANNELS_LAST:
        return first + (p[:, None] * channels + c[None, :])
    return first + (c[None, :] * positions + p[:, None])


@triton.jit
def _joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST):
    """Into x and the skip that continues it along the channels; a group may lie in both."""
    pointers = _pointers(x_ptr, image, c, p, x_channels, positions, CHANNELS_LAST)
    if skip_ptr is not None:
        of_skip = _pointers(skip_ptr, image, c - x_channels, p, skip_channels, positions, CHANNELS_LAST)
        pointers = tl.where((c < x_channels)[None, :], pointers, of_skip)
    return pointers


@triton.jit
def _widened(values):
    """In the precision of sums and arithmetic."""
    return values.to(tl.float64 if values.dtype == tl.float64 else tl.float32)


@triton.jit
def _by_unit(values, UNIT: tl.constexpr):
    """(rows, channels of the tile) -> (rows, units, channels of a unit): the shape that all arithmetic is in. It moves nothing
    from register to register."""
    return tl.reshape(values, (values.shape[0], values.shape[1] // UNIT, UNIT))


@triton.jit
def _flat(values):
    """Back again."""
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def _loaded(pointers, inside, UNIT, WHOLE: tl.constexpr):
    """A tile by unit, 0 outside the image."""
    return _by_unit(tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0), UNIT)


@triton.jit
def _store(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, _flat(values))
    else:
        tl.store(pointers, _flat(values), mask=inside)


@triton.jit
def _kept(values, inside, UNIT, WHOLE: tl.constexpr):
    """The values of a tile by unit, 0 outside the image."""
    if WHOLE:
        return values
    else:
        return tl.where(_by_unit(inside, UNIT), values, 0.0)


@triton.jit
def _numbers(ptr, c, has_channel, UNIT):
    """One number a channel, (1, units, channels of a unit)."""
    return _by_unit(_widened(tl.load(ptr + c, mask=has_channel, other=0.0))[None, :], UNIT)


@triton.jit
def _store_numbers(ptr, c, values, has_channel):
    """What :func:`_numbers` reads."""
    tl.store(ptr + c[None, :], _flat(values), mask=has_channel[None, :])


@triton.jit
def _input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE):
    """The tile of v = concat(x, skip) + pre_shift, 0 outside the image."""
    v = _widened(_loaded(pointers, inside, UNIT, WHOLE))
    if pre_shift_ptr is not None:
        v = _kept(v + _numbers(pre_shift_ptr + image * pre_shift_stride, c, has_channel, UNIT), inside, UNIT, WHOLE)
    return v


@triton.jit
def _over_positions(values):
    """The sums, one number a channel: (1, units, channels of a unit)."""
    return tl.sum(values, axis=0)[None, :, :]


@triton.jit
def _over_groups(values, GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The sums of each group, beside each of its units: (1, units, 1)."""
    units: tl.constexpr = values.shape[1]
    # First along the axis that a thread has most of. One axis at a time: over both at once, which is one axis after a
    # permutation and a reshape, Triton 3.6 and 3.7 add the wrong lanes where the units between them are in lanes as well.
    sums = tl.sum(tl.sum(values, axis=2), axis=0) if CHANNELS_LAST else tl.sum(tl.sum(values, axis=0), axis=1)
    if GROUP_SIZE != UNIT:
        member = tl.arange(0, units) // (GROUP_SIZE // UNIT)
        sums = tl.sum(tl.where(member[:, None] == member[None, :], sums[None, :], 0.0), axis=1)
    return sums[None, :, None]


@triton.jit
def _rounded_quotient(sums, count):
    """A number to store and to subtract. What `/` stands for is a product with a reciprocal, which may be fused with a
    subtraction: then what is subtracted has more digits than what is stored."""
    if sums.dtype == tl.float64:
        return sums / count
    else:
        return tl.div_rn(sums, tl.full(sums.shape, count, tl.float32))


@triton.jit
def _tile_statistics(v, inside, positions, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE, STORED: tl.constexpr):
    """Each group's mean, provisionally, what that lacks of the mean, and the sum of squared deviations from the mean, each
    (1, units, 1); and the tile's deviations from the provisional mean. That is good for nothing else unless `STORED`.

    The second pass sums about the provisional mean and corrects both (Chan, Golub and LeVeque 1983). The mean stays in two
    parts, because rounding their sum may cost more digits than a small spread has.
    """
    count = positions * GROUP_SIZE
    sums = _over_groups(v, GROUP_SIZE, UNIT, CHANNELS_LAST)
    mean = _rounded_quotient(sums, count) if STORED else sums / count
    d = _kept(v - mean, inside, UNIT, WHOLE)
    correction = _over_groups(d, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
    squares = _over_groups(d * d, GROUP_SIZE, UNIT, CHANNELS_LAST)
    return mean, correction, squares - count * correction * correction, d


@triton.jit
def _statistics(
    v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
):
    """v less a provisional mean; for each unit what that lacks of its group's mean, and 1 / sqrt(var + eps)."""
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
def _gain_and_bias(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT):
    """Of y = normalised * gain + bias, one number a channel."""
    gain = _numbers(weight_ptr, c, has_channel, UNIT)
    bias = _numbers(bias_ptr, c, has_channel, UNIT)
    if scale_ptr is not None:
        scale = 1.0 + _numbers(scale_ptr + image * scale_stride, c, has_channel, UNIT)
        gain *= scale
        bias *= scale
    if shift_ptr is not None:
        bias += _numbers(shift_ptr + image * shift_stride, c, has_channel, UNIT)
    return gain, bias


@triton.jit
def _sigmoid(y):
    if y.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-y))
    else:
        return 1.0 / (1.0 + tl.exp2(y * -LOG2E))  # without tl.exp's care for denormal results, to which 1 is added


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
    """What :func:`_tile_statistics` finds in each chunk, to (images, chunks, 3, groups)."""
    image, chunk, group, has_group, c, p, has_channel, inside = _place(
        blocks, chunks, x_channels + skip_channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = _joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = _input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    size = tl.minimum(positions - chunk * BLOCK_P, BLOCK_P)
    mean, correction, squares, _ = _tile_statistics(v, inside, size, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE, True)
    pointers = (partials_ptr + (image * chunks + chunk) * 3 * groups + group)[None, :, None]
    exists = has_group[None, :, None]
    tl.store(pointers, mean, mask=exists)
    tl.store(pointers + groups, correction, mask=exists)
    tl.store(pointers + 2 * groups, squares, mask=exists)


@triton.jit
def _partials(partials_ptr, image, chunks, first, group, groups, positions, GROUP_SIZE, BLOCK_P, ROWS: tl.constexpr):
    """The next `ROWS` chunks' statistics: pointers, which exist, and the number of elements they are of."""
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
    """The chunks' statistics -> each image's provisional mean, what that lacks of the mean, and 1 / sqrt(var + eps), to
    (images, 3, groups). Two passes again, over the chunks' means."""
    blocks = tl.cdiv(groups, GROUPS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * GROUPS + tl.arange(0, GROUPS)
    count = positions * GROUP_SIZE
    mean = tl.zeros([GROUPS], partials_ptr.dtype.element_ty)
    for first in range(0, chunks, ROWS):
        pointers, inside, size = _partials(
            partials_ptr, image, chunks, first, group, groups, positions, GROUP_SIZE, BLOCK_P, ROWS
        )
        mean += tl.sum(size * tl.load(pointers, mask=inside, other=0.0), axis=0)
    mean = _rounded_quotient(mean, count)
    deviations = tl.zeros_like(mean)
    squares = tl.zeros_like(mean)
    for first in range(0, chunks, ROWS):
        pointers, inside, size = _partials(
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
    image, _, group, has_group, c, p, has_channel, inside = _place(
        blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = _joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = _input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    d, correction, rstd = _statistics(
        v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
    )
    gain, bias = _gain_and_bias(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT
    )
    gain *= rstd
    y = d * gain + (bias - correction * gain)
    if SILU:
        y *= _sigmoid(y)
    if residual_ptr is not None:
        pointers = _pointers(residual_ptr, image, c, p, channels, positions, CHANNELS_LAST)
        y += _widened(_loaded(pointers, inside, UNIT, WHOLE))
    _store(_pointers(out_ptr, image, c, p, channels, positions, CHANNELS_LAST), y, inside, WHOLE)


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
    image, chunk, group, has_group, c, p, has_channel, inside = _place(
        blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P, BLOCK_C
    )
    pointers = _joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
    v = _input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE)
    # Both loads are under way before anything waits for one.
    pointers = _pointers(grad_ptr, image, c, p, channels, positions, CHANNELS_LAST)
    grad = _loaded(pointers, inside, UNIT, WHOLE)
    d, correction, rstd = _statistics(
        v, inside, statistics_ptr, image, group, has_group, groups, positions, eps, GROUP_SIZE, UNIT, CHANNELS_LAST, WHOLE
    )
    gain, bias = _gain_and_bias(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, image, c, has_channel, UNIT
    )
    normalised = (d - correction) * rstd
    dy = _widened(grad)  # y = normalised * gain + bias
    if SILU:
        y = normalised * gain + bias
        sigmoid = _sigmoid(y)
        dy *= sigmoid * (1.0 + y * (1.0 - sigmoid))

    # The other gradients follow from two sums over the positions. They are those of this tile where it is a whole image;
    # otherwise one launch writes those of each chunk, and the next one reads their totals.
    if statistics_ptr is None or x_grad_ptr is None:
        dy_sum, product_sum = _over_positions(dy), _over_positions(dy * normalised)
        first = sums_ptr + (image * chunks + chunk) * 2 * channels
        _store_numbers(first, c, dy_sum, has_channel)
        _store_numbers(first + channels, c, product_sum, has_channel)
    else:
        first = sums_ptr + image * 2 * channels
        dy_sum = _numbers(first, c, has_channel, UNIT)
        product_sum = _numbers(first + channels, c, has_channel, UNIT)

    if x_grad_ptr is not None:
        # The norm takes out of the gradient what would move a group's mean or its spread.
        count = positions * GROUP_SIZE
        of_mean = _over_groups(gain * dy_sum, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
        of_spread = _over_groups(gain * product_sum, GROUP_SIZE, UNIT, CHANNELS_LAST) / count
        dv = (dy * gain - of_mean - normalised * of_spread) * rstd
        pointers = _joined_pointers(x_grad_ptr, skip_grad_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST)
        _store(pointers, dv, inside, WHOLE)
        if pre_shift_grad_ptr is not None:
            first = pre_shift_grad_ptr + (image * chunks + chunk) * channels
            _store_numbers(first, c, _over_positions(_kept(dv, inside, UNIT, WHOLE)), has_channel)


@triton.jit
def totals_kernel(sums_ptr, bias_grad_ptr, weight_grad_ptr, images, channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sums of all images, (images, 2, channels), added up: the gradients of bias and weight."""
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
    call = _Call(x, num_groups, weight, bias, pre_shift, scale, shift, skip, FORWARD)
    residual = call.in_format(residual)
    out = call.empty_image(call.channels)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        group_norm_silu_kernel[call.grid](
            call.x,
            call.skip,
            residual,
            out,
            *call.numbers,
            _chunked_statistics(call, eps),
            *call.strides,
            *call.sizes,
            eps,
            silu,
            **call.options,
        )
    return out


class Gradients(NamedTuple):
    """Of the inputs of :func:`group_norm_silu`; None where there was no such input."""

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

    The statistics are computed again, so that the forward pass need keep nothing but its inputs.
    """
    call = _Call(x, num_groups, weight, bias, pre_shift, scale, shift, skip, BACKWARD)
    grad = call.in_format(grad)
    x_grad = call.empty_image(x.shape[1])
    skip_grad = None if skip is None else call.empty_image(skip.shape[1])
    options = {"dtype": call.wide, "device": x.device}
    allocate = torch.empty if grad.numel() > 0 else torch.zeros
    sums = allocate(len(x), call.chunks, 2, call.channels, **options)
    pre_shift_grad = None
    if pre_shift is not None:
        parts = options if call.chunks > 1 else {**options, "dtype": pre_shift.dtype}
        pre_shift_grad = allocate(len(x), call.chunks, call.channels, **parts)
    if grad.numel() > 0:
        inputs = (grad, call.x, call.skip, *call.numbers)
        rest = (*call.strides, *call.sizes, eps, silu)
        with torch.cuda.device_of(x):
            statistics = _chunked_statistics(call, eps)
            if statistics is not None:
                group_norm_silu_backward_kernel[call.grid](*inputs, statistics, sums, None, None, None, *rest, **call.options)
                sums = sums.sum(dim=1, keepdim=True)
            group_norm_silu_backward_kernel[call.grid](
                *inputs, statistics, sums, x_grad, skip_grad, pre_shift_grad, *rest, **call.options
            )

    sums = sums[:, 0]  # over the positions, of dy and of dy * normalised: (images, 2, channels)
    scale_grad = shift_grad = None
    if scale is not None:
        scale_grad = (weight * sums[:, 1] + bias * sums[:, 0]).to(scale.dtype)
    if shift is not None:
        shift_grad = sums[:, 0].to(shift.dtype, copy=True)
    if scale is not None:
        sums = sums * (1 + scale.to(call.wide))[:, None]
    if pre_shift is not None:
        pre_shift_grad = pre_shift_grad[:, 0] if call.chunks == 1 else pre_shift_grad.sum(1).to(pre_shift.dtype)
    bias_grad, weight_grad = (torch.empty(call.channels, dtype=t.dtype, device=x.device) for t in (bias, weight))
    rows, block_c = TOTAL
    with torch.cuda.device_of(x):
        totals_kernel[triton.cdiv(call.channels, block_c),](
            sums, bias_grad, weight_grad, len(x), call.channels, ROWS=rows, BLOCK_C=block_c
        )
    return Gradients(
        x_grad,
        weight_grad,
        bias_grad,
        pre_shift_grad,
        scale_grad,
        shift_grad,
        skip_grad,
    )


class _Call:
    """The inputs as the kernels take them, and how an image is cut into tiles."""

    def __init__(self, x, num_groups, weight, bias, pre_shift, scale, shift, skip, tuning) -> None:
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.skip = self.in_format(x), self.in_format(skip)
        skip_channels = 0 if skip is None else skip.shape[1]
        self.channels = x.shape[1] + skip_channels
        self.num_groups = num_groups
        rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in (pre_shift, scale, shift)]
        self.numbers = (weight.contiguous(), bias.contiguous(), *rows)
        self.strides = [0 if t is None else t.stride(0) for t in rows]

        self.positions = max(1, x.shape[2] * x.shape[3])  # nothing is launched for empty images, but tiles are counted
        group_size = self.channels // num_groups
        groups, block_p, block_c, num_warps = _tile(
            self.positions, group_size, num_groups, x.element_size(), channels_last, tuning
        )
        blocks, self.chunks = triton.cdiv(num_groups, groups), triton.cdiv(self.positions, block_p)
        self.sizes = (x.shape[1], skip_channels, self.positions, num_groups, blocks, self.chunks)
        self.grid = (len(x) * self.chunks * blocks,)
        self.options = {
            "CHANNELS_LAST": channels_last,
            "GROUPS": groups,
            "GROUP_SIZE": group_size,
            "UNIT": group_size & -group_size,
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            "WHOLE": self.positions % block_p == 0 and num_groups % groups == 0 and groups * group_size == block_c,
            "num_warps": num_warps,
        }

    def in_format(self, image: torch.Tensor | None) -> torch.Tensor | None:
        return None if image is None else image.contiguous(memory_format=self.format)

    def empty_image(self, channels: int) -> torch.Tensor:
        shape = (len(self.x), channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.format)


@functools.cache
def why_not_group(group_size: int) -> str | None:
    """Why no tile that Triton compiles holds a group of this many channels, or None."""
    if group_size > MOST_CHANNELS:
        return f"it takes groups of up to {MOST_CHANNELS} channels, not {group_size}"
    if _units_of_tile(group_size) > MOST_UNITS:
        unit = group_size & -group_size
        return f"it takes groups of up to {MOST_UNITS * unit} channels where {2 * unit} does not divide them, not {group_size}"
    return None


def _units_of_tile(group_size: int, groups: int = 1) -> int:
    """Of a tile of so many groups. Where a group is one unit, no sums are added over units, and they count for nothing."""
    unit = group_size & -group_size
    return 0 if unit == group_size else triton.next_power_of_2(groups * group_size) // unit


def _tile(
    positions: int, group_size: int, num_groups: int, itemsize: int, channels_last: bool, tuning: tuple[tuple[int, int], ...]
) -> tuple[int, int, int, int]:
    """Of a tile: groups, positions and channels, all powers of two, and warps."""
    largest = tuning[-1][0]
    usual = largest // 4
    block_p = triton.next_power_of_2(positions)

    def block_c(groups: int) -> int:
        return triton.next_power_of_2(groups * group_size)

    def is_narrow(groups: int) -> bool:
        return channels_last and groups * group_size * itemsize < ROW

    def can_double(groups: int) -> bool:
        return groups < num_groups and _units_of_tile(group_size, 2 * groups) <= MOST_UNITS

    def wants_more(groups: int) -> bool:
        row = groups * group_size * itemsize
        must = row < SECTOR or row % ACCESS != 0
        may = block_p * block_c(2 * groups) <= usual
        return (is_narrow(groups) and (must or may)) or block_p * block_c(groups) < SMALL

    groups = 1
    while can_double(groups) and wants_more(groups):
        groups *= 2
    fewer = groups // 2
    if fewer * group_size * itemsize >= NARROWEST and block_p * block_c(groups) > largest >= block_p * block_c(fewer):
        groups = fewer
    if block_p * block_c(groups) > largest:  # an image takes several tiles, whose rows may as well be wide
        while can_double(groups) and is_narrow(groups):
            groups *= 2
        block_p = max(1, usual // block_c(groups))
    elements = block_p * block_c(groups)
    registers = elements * max(1, itemsize // 4)  # 16-bit values are widened
    num_warps = next((warps for limit, warps in tuning if registers <= limit), tuning[-1][1])
    return groups, block_p, block_c(groups), num_warps


def _chunked_statistics(call: _Call, eps: float) -> torch.Tensor | None:
    """What :func:`merge_kernel` writes, or None where a tile is a whole image."""
    if call.chunks == 1:
        return None
    options = {"dtype": call.wide, "device": call.x.device}
    partials = torch.empty(len(call.x), call.chunks, 3, call.num_groups, **options)
    statistics = torch.empty(len(call.x), 3, call.num_groups, **options)
    pre_shift = call.numbers[2]
    chunk_statistics_kernel[call.grid](call.x, call.skip, pre_shift, partials, call.strides[0], *call.sizes, **call.options)
    groups, rows = MERGE
    merge_kernel[(len(call.x) * triton.cdiv(call.num_groups, groups),)](
        partials,
        statistics,
        call.positions,
        call.num_groups,
        call.chunks,
        eps,
        GROUP_SIZE=call.options["GROUP_SIZE"],
        BLOCK_P=call.options["BLOCK_P"],
        GROUPS=groups,
        ROWS=rows,
    )
    return statistics
