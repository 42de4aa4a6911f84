"""The tiles of group_norm_silu's kernels: how their sizes are chosen, and how they are loaded, reduced and stored.

A tile is `BLOCK_P` positions of one image by `BLOCK_C` channels, of which the first `GROUPS * GROUP_SIZE` are in use: whole
groups. `UNIT`, the largest power of two that divides a group, makes units of its channels: mostly the group is one unit.
Where all positions of an image fit one tile, a program holds it in registers from the first sum to the result, and
memory is read once and written once. Larger images are cut into chunks of positions.

Tiles depend on the shape of one image only, never on the number of images, so an image has the same bits in every batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "BACKWARD",
    "FORWARD",
    "Inputs",
    "joined_pointers",
    "load_input",
    "load_per_channel",
    "load_tile",
    "masked",
    "store_per_channel",
    "store_tile",
    "sum_over_groups",
    "sum_over_positions",
    "tile_coordinates",
    "tile_pointers",
    "to_accumulator",
    "why_not_group",
]

# (up to this many elements a tile, warps): 32 or 64 elements a thread, which was fastest on an H100, also in the backward pass,
# which holds two tiles. The last entry is the largest tile that a multiprocessor holds; a quarter of it leaves room for other
# programs, which read while this one computes.
FORWARD = ((2048, 2), (4096, 4), (8192, 4), (16384, 8), (32768, 16))
BACKWARD = ((2048, 2), (4096, 4), (8192, 4), (16384, 8))

# Bytes of a tile's rows in a channels_last image: whole 16-byte accesses, at least a sector of 32 bytes, and up to 64 where
# that costs nothing.
ROW = 64
SECTOR = 32
ACCESS = 16

# A row of at least this many bytes is cheaper than reading an image twice.
NARROWEST = 24

# Tiles of fewer elements take more groups.
SMALL = 2048

# The widest group, in channels, and the most units of a tile whose groups have several units, which are summed through a matrix
# of units by units. With 256 units Triton 3.7 compiles for up to a minute and registers spill; 2048 exceed its largest tensor.
MOST_CHANNELS = 1 << 14
MOST_UNITS = 128


class Geometry(NamedTuple):
    """The tiling of images of one shape.

    Attributes:
        channels: of an image, with the skip's.
        positions: height times width.
        num_groups: of the norm.
        blocks, chunks: tiles of an image along the channels and along the positions.
        sizes: the kernels' arguments from ``x_channels`` to ``chunks``.
        options: the kernels' compile-time constants and their warps.
    """

    channels: int
    positions: int
    num_groups: int
    blocks: int
    chunks: int
    sizes: tuple[int, ...]
    options: dict[str, Any]


@functools.cache
def choose_geometry(
    x_channels: int,
    skip_channels: int,
    positions: int,
    num_groups: int,
    dtype: torch.dtype,
    channels_last: bool,
    tuning: tuple[tuple[int, int], ...],
) -> Geometry:
    """The tiling of images of one shape, dtype and memory format; ``tuning`` is FORWARD or BACKWARD."""
    channels = x_channels + skip_channels
    group_size = channels // num_groups
    groups, block_p, block_c, num_warps = _choose_tile(positions, group_size, num_groups, dtype.itemsize, channels_last, tuning)
    blocks, chunks = triton.cdiv(num_groups, groups), triton.cdiv(positions, block_p)
    options = {
        "CHANNELS_LAST": channels_last,
        "GROUPS": groups,
        "GROUP_SIZE": group_size,
        "UNIT": group_size & -group_size,
        "BLOCK_P": block_p,
        "BLOCK_C": block_c,
        "WHOLE": positions % block_p == 0 and num_groups % groups == 0 and groups * group_size == block_c,
        "num_warps": num_warps,
    }
    sizes = (x_channels, skip_channels, positions, num_groups, blocks, chunks)
    return Geometry(channels, positions, num_groups, blocks, chunks, sizes, options)


class Inputs:
    """The inputs of a norm in the layouts that the kernels take, and the geometry of its images.

    Attributes:
        x, skip: in the memory format of ``x``; the others are copied into it.
        per_channel: weight, bias, pre_shift, scale and shift, with dense channels.
        strides: between the rows of pre_shift, scale and shift.
        accumulator: the dtype of sums.
        geometry: of the images.
        grid: one program a tile.
    """

    def __init__(self, x, num_groups, weight, bias, pre_shift, scale, shift, skip, tuning) -> None:
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.skip = self.in_format(x), self.in_format(skip)
        rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in (pre_shift, scale, shift)]
        self.per_channel = (weight.contiguous(), bias.contiguous(), *rows)
        self.strides = [0 if t is None else t.stride(0) for t in rows]
        skip_channels = 0 if skip is None else skip.shape[1]
        positions = max(1, x.shape[2] * x.shape[3])  # nothing is launched for empty images, but tiles are counted
        self.geometry = choose_geometry(x.shape[1], skip_channels, positions, num_groups, x.dtype, channels_last, tuning)
        self.grid = (len(x) * self.geometry.chunks * self.geometry.blocks,)

    def in_format(self, image: torch.Tensor | None) -> torch.Tensor | None:
        return None if image is None else image.contiguous(memory_format=self.memory_format)

    def empty_image(self, channels: int) -> torch.Tensor:
        shape = (len(self.x), channels, *self.x.shape[2:])
        return torch.empty(shape, dtype=self.x.dtype, device=self.x.device, memory_format=self.memory_format)


@functools.cache
def why_not_group(group_size: int) -> str | None:
    """Why the kernels cannot take groups of this many channels, or None."""
    if group_size > MOST_CHANNELS:
        return f"it takes groups of up to {MOST_CHANNELS} channels, not {group_size}"
    if _units_of_tile(group_size) > MOST_UNITS:
        unit = group_size & -group_size
        return f"it takes groups of up to {MOST_UNITS * unit} channels where {2 * unit} does not divide them, not {group_size}"
    return None


def _units_of_tile(group_size: int, groups: int = 1) -> int:
    """The units of a tile of ``groups`` groups whose sums are added over units: 0 where a group is one unit."""
    unit = group_size & -group_size
    return 0 if unit == group_size else triton.next_power_of_2(groups * group_size) // unit


def _choose_tile(
    positions: int, group_size: int, num_groups: int, itemsize: int, channels_last: bool, tuning: tuple[tuple[int, int], ...]
) -> tuple[int, int, int, int]:
    """A tile's groups, positions and channels, all powers of two, and its warps."""
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


@triton.jit
def tile_coordinates(
    blocks, chunks, channels, positions, groups, GROUPS, GROUP_SIZE, UNIT, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The image and chunk of this program; the group of each unit and its mask; channels and positions, the channels' mask
    and the tile's. Programs that share the rows of a channels_last image are neighbours, so that they share its cache lines."""
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
def tile_pointers(ptr, image, c, p, channels, positions, CHANNELS_LAST):
    # 64 bits between images, 32 within one: images of 2**31 elements are refused by the operator.
    first = ptr + image * channels * positions
    if CHANNELS_LAST:
        return first + (p[:, None] * channels + c[None, :])
    return first + (c[None, :] * positions + p[:, None])


@triton.jit
def joined_pointers(x_ptr, skip_ptr, image, c, p, x_channels, skip_channels, positions, CHANNELS_LAST):
    """Pointers into x and into the skip that continues it along the channels; a group may lie in both."""
    pointers = tile_pointers(x_ptr, image, c, p, x_channels, positions, CHANNELS_LAST)
    if skip_ptr is not None:
        skip_pointers = tile_pointers(skip_ptr, image, c - x_channels, p, skip_channels, positions, CHANNELS_LAST)
        pointers = tl.where((c < x_channels)[None, :], pointers, skip_pointers)
    return pointers


@triton.jit
def to_accumulator(values):
    """Values in the dtype of sums and arithmetic: float32, or float64 for float64."""
    return values.to(tl.float64 if values.dtype == tl.float64 else tl.float32)


@triton.jit
def by_unit(values, UNIT: tl.constexpr):
    """(rows, channels) -> (rows, units, channels of a unit), the shape of all arithmetic. No value changes its register."""
    return tl.reshape(values, (values.shape[0], values.shape[1] // UNIT, UNIT))


@triton.jit
def by_channel(values):
    """(rows, units, channels of a unit) -> (rows, channels)."""
    return tl.reshape(values, (values.shape[0], values.shape[1] * values.shape[2]))


@triton.jit
def load_tile(pointers, inside, UNIT, WHOLE: tl.constexpr):
    """A tile by unit, with 0 outside the image."""
    return by_unit(tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0), UNIT)


@triton.jit
def store_tile(pointers, values, inside, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, by_channel(values))
    else:
        tl.store(pointers, by_channel(values), mask=inside)


@triton.jit
def masked(values, inside, UNIT, WHOLE: tl.constexpr):
    """The values of a tile by unit, with 0 outside the image."""
    if WHOLE:
        return values
    else:
        return tl.where(by_unit(inside, UNIT), values, 0.0)


@triton.jit
def load_per_channel(ptr, c, has_channel, UNIT):
    """One value per channel, (1, units, channels of a unit)."""
    return by_unit(to_accumulator(tl.load(ptr + c, mask=has_channel, other=0.0))[None, :], UNIT)


@triton.jit
def store_per_channel(ptr, c, values, has_channel):
    """Stores (1, units, channels of a unit), one value per channel."""
    tl.store(ptr + c[None, :], by_channel(values), mask=has_channel[None, :])


@triton.jit
def load_input(pointers, pre_shift_ptr, pre_shift_stride, image, c, has_channel, inside, UNIT, WHOLE):
    """The tile of v = concat(x, skip) + pre_shift, 0 outside the image."""
    v = to_accumulator(load_tile(pointers, inside, UNIT, WHOLE))
    if pre_shift_ptr is not None:
        v = masked(v + load_per_channel(pre_shift_ptr + image * pre_shift_stride, c, has_channel, UNIT), inside, UNIT, WHOLE)
    return v


@triton.jit
def sum_over_positions(values):
    """The sum of each channel: (1, units, channels of a unit)."""
    return tl.sum(values, axis=0)[None, :, :]


@triton.jit
def sum_over_groups(values, GROUP_SIZE: tl.constexpr, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """The sum of each group, repeated for each of its units: (1, units, 1)."""
    units: tl.constexpr = values.shape[1]
    # First along the axis that a thread has most of. One axis at a time: over both at once, which is one axis after a
    # permutation and a reshape, Triton 3.6 and 3.7 add the wrong lanes where the units between them are in lanes as well.
    sums = tl.sum(tl.sum(values, axis=2), axis=0) if CHANNELS_LAST else tl.sum(tl.sum(values, axis=0), axis=1)
    if GROUP_SIZE != UNIT:
        member = tl.arange(0, units) // (GROUP_SIZE // UNIT)
        sums = tl.sum(tl.where(member[:, None] == member[None, :], sums[None, :], 0.0), axis=1)
    return sums[None, :, None]
