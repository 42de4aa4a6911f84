"""The processors, GPUs and layouts for which the operators were measured to be faster than PyTorch's."""

from __future__ import annotations

import functools

import torch

from . import native, torch_private

__all__ = [
    "FASTER_IN_CPP",
    "FASTER_ON_GPU",
    "bf16_products",
    "compute_capability",
    "instruction_set",
    "is_faster_in_cpp",
    "is_faster_on_gpu",
]

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

# (operator, compute capability, dtype, memory format), from the files unet_parts.json under benchmarks/results, which
# benchmarks/gpu/unet_parts.py writes. No such file exists yet, so PyTorch serves on every GPU. DDIM_FAST_BACKEND=triton asks
# for ours.
FASTER_ON_GPU: frozenset[tuple[str, str, str, str]] = frozenset()


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


def is_faster_on_gpu(operator: str, device: torch.device, dtype: torch.dtype, memory_format: str = "channels_last") -> bool:
    """Whether ours was measured to be faster than PyTorch's on a GPU like this one; never on a CPU.

    Args:
        operator: as in :data:`FASTER_ON_GPU`.
        device: of the images.
        dtype: of the images.
        memory_format: of the images, ``channels_last`` or ``contiguous``.
    """
    if device.type != "cuda" or not FASTER_ON_GPU:
        return False
    return (operator, compute_capability(device), str(dtype).removeprefix("torch."), memory_format) in FASTER_ON_GPU


@functools.cache
def compute_capability(device: torch.device) -> str:
    """Of a GPU: sm_90 for an H100."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


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
