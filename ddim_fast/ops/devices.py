"""Which device and dtype to use when the user leaves it open."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["bf16_is_fast", "keep_memory", "pick_device"]


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: the device is not there.
    """
    import torch  # not above: commands name devices before they know whether torch is needed

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}; choose auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        there = f"torch sees {count} CUDA devices" if count else "torch sees no CUDA device; choose auto or cpu"
        raise ValueError(f"device {name!r} is not available: {there}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # some of torch's functions want the number
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: Ampere or later, or a CPU with AVX-512 BF16 or AMX, where
    DDIM_FAST_CPU does not ask for less."""
    import torch

    from .measured import bf16_products

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bf16_products() is not None


def keep_memory(device: torch.device) -> None:
    """Has the C library keep memory that is freed, for the next evaluation of a network on a CPU.

    glibc gives memory back to the system beyond a threshold, twice the size of the largest block that was freed so far, and
    each of its pages is then fetched anew: a tenth of the time at batch 8. After a block of 32 MiB the threshold is 64 MiB, the
    highest that glibc chooses by itself. The block is never written, so it costs nothing.
    """
    import torch

    if device.type == "cpu":
        torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)
