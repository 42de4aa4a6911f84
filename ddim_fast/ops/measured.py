"""The processors and layouts for which the C++ operators were measured to be faster than PyTorch's."""

from __future__ import annotations

import functools

import torch

from . import native, torch_private

__all__ = ["FASTER_IN_CPP", "bf16_products", "instruction_set", "is_faster_in_cpp"]

# (operator, instruction set, dtype, memory format), from the files every_cpu-*.json under benchmarks/results, which
# benchmarks/every_cpu.py writes; tests/ops/test_measured.py compares the two. Where there is no row, PyTorch serves.
FASTER_IN_CPP: frozenset[tuple[str, str, str, str]] = frozenset(
    {
        ("conv3x3", "avx2", "float32", "channels_last"),
        ("conv3x3", "avx512", "float32", "channels_last"),
        ("conv3x3", "avx512_bf16", "bfloat16", "channels_last"),
        ("group_norm_silu", "avx2", "float32", "channels_last"),
        ("group_norm_silu", "avx2", "float32", "contiguous"),
        ("group_norm_silu", "avx512", "float32", "channels_last"),
        ("group_norm_silu", "avx512", "float32", "contiguous"),
        ("group_norm_silu", "avx512_bf16", "bfloat16", "channels_last"),
        ("group_norm_silu", "avx512_bf16", "bfloat16", "contiguous"),
        ("ddim_step", "avx2", "float32", "contiguous"),
        ("ddim_step", "avx512", "float32", "contiguous"),
        ("ddim_step", "avx512_bf16", "bfloat16", "contiguous"),
        ("captured", "avx2", "float32", "channels_last"),
        ("captured", "avx512", "float32", "channels_last"),
        ("captured", "avx512_bf16", "bfloat16", "channels_last"),
    }
)


@functools.cache
def is_faster_in_cpp(operator: str, dtype: torch.dtype, memory_format: str) -> bool:
    """Whether the C++ operator was measured to be faster than PyTorch's on a processor like this one.

    Args:
        operator: ``conv3x3``, ``group_norm_silu`` or ``ddim_step``; or ``captured``, the engine, beside the eager one.
        dtype: of the images.
        memory_format: of the images, ``channels_last`` or ``contiguous``.
    """
    row = (operator, instruction_set(dtype), str(dtype).removeprefix("torch."), memory_format)
    return row in FASTER_IN_CPP


@functools.cache
def bf16_products() -> str | None:
    """The instructions with which PyTorch multiplies bfloat16 on this CPU: amx, avx512_bf16, or None without any."""
    if not torch_private.has_avx512_bf16() or (native.module and native.module.instruction_set() != "avx512"):
        return None
    return "amx" if torch_private.has_amx() else "avx512_bf16"


def instruction_set(dtype: torch.dtype) -> str:
    """The instructions of the C++ operators: baseline, avx2, avx512, or avx512_bf16 for bfloat16 where the CPU has it."""
    name = native.module.instruction_set()
    return "avx512_bf16" if dtype == torch.bfloat16 and native.module.conv3x3_has_bf16() else name
