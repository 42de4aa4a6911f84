"""What follows a convolution in one pass over its result: bias, time embedding and residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .group_norm_tiles import to_accumulator

__all__ = ["add_bias"]

# Elements and warps of a program: 32 elements a thread, several 16-byte accesses in flight. Not measured yet.
BLOCK, WARPS = 4096, 4

# A row is cut into pieces of its largest power of two, if that is at least this many elements: 384 channels into 3 times 128.
NARROWEST, WIDEST = 64, 256


@triton.jit
def add_bias_kernel(
    image_ptr,
    bias_ptr,
    shift_ptr,
    residual_ptr,
    out_ptr,
    shift_stride,
    rows,
    columns,
    positions,
    channels,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A row of memory is a pixel's channels in channels_last, and a channel's pixels otherwise."""
    pieces = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // pieces).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0) % pieces * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows, in_columns = (row < rows)[:, None], (column < columns)[None, :]
    inside = in_rows & in_columns
    offsets = row[:, None] * columns + column[None, :]
    y = to_accumulator(tl.load(image_ptr + offsets, mask=inside, other=0.0))
    if CHANNELS_LAST:
        if bias_ptr is not None:
            y += to_accumulator(tl.load(bias_ptr + column[None, :], mask=in_columns, other=0.0))
        if shift_ptr is not None:
            pointers = shift_ptr + (row // positions)[:, None] * shift_stride + column[None, :]
            y += to_accumulator(tl.load(pointers, mask=inside, other=0.0))
    else:
        channel = (row % channels)[:, None]
        if bias_ptr is not None:
            y += to_accumulator(tl.load(bias_ptr + channel, mask=in_rows, other=0.0))
        if shift_ptr is not None:
            pointers = shift_ptr + (row // channels)[:, None] * shift_stride + channel
            y += to_accumulator(tl.load(pointers, mask=in_rows, other=0.0))
    if residual_ptr is not None:
        y += to_accumulator(tl.load(residual_ptr + offsets, mask=inside, other=0.0))
    tl.store(out_ptr + offsets, y, mask=inside)


def add_bias(
    image: torch.Tensor,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """image + bias + shift + residual in float32 (float64 for that), rounded once.

    Arguments are those of :func:`ddim_fast.ops.add_bias.add_bias`, which checks them.

    Args:
        out: receives the result, possibly ``image`` itself; dense, in the memory format of ``image``. None allocates it.
    """
    channels_last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    image = image.contiguous(memory_format=memory_format)
    residual = None if residual is None else residual.contiguous(memory_format=memory_format)
    bias = None if bias is None else bias.contiguous()
    shift = shift if shift is None or shift.stride(1) == 1 else shift.contiguous()
    out = torch.empty_like(image) if out is None else out
    if image.numel() == 0:
        return out
    n, channels, height, width = image.shape
    positions = height * width
    rows, columns = (n * positions, channels) if channels_last else (n * channels, positions)
    piece = columns & -columns
    block_c = min(WIDEST, piece if piece >= NARROWEST else triton.next_power_of_2(columns))
    block_r = BLOCK // block_c
    with torch.cuda.device_of(image):
        add_bias_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)](
            image,
            bias,
            shift,
            residual,
            out,
            0 if shift is None else shift.stride(0),
            rows,
            columns,
            positions,
            channels,
            CHANNELS_LAST=channels_last,
            BLOCK_R=block_r,
            BLOCK_C=block_c,
            num_warps=WARPS,
        )
    return out
