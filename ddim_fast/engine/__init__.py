"""Execution of sampling runs: eager, compiled, or captured in one CUDA graph or one plan of native operators.

An engine executes functions of tensors and knows nothing of networks, guidance or solvers.
"""

from __future__ import annotations

import warnings

import torch

from ..ops import native
from ..ops.devices import bf16_is_fast
from ..ops.measured import bf16_products, is_faster_in_cpp
from .captured import Captured
from .captured_cpu import CapturedOnCpu
from .compiled import Compiled, why_not_compiled
from .eager import Eager
from .inference import inference

__all__ = [
    "ENGINES",
    "Engine",
    "fastest_engine",
    "inference",
    "make_engine",
    "select_engine",
    "why_not_compiled",
]

Engine = Eager

ENGINES = ("auto", "eager", "compiled", "captured")


def select_engine(name: str, device: torch.device) -> str:
    """The engine that ``name`` means on ``device``; ``auto`` is eager, which needs no warm-up.

    Raises:
        ValueError: there is no such engine, or not there.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are {', '.join(ENGINES)}")
    if name == "captured":
        if device.type not in ("cuda", "cpu"):
            raise ValueError(
                f"the captured engine is for CUDA and CPUs, but the network is on {device}; choose eager or compiled"
            )
        if device.type == "cpu" and native.module is None:
            raise ValueError(f"the captured engine needs the C++ operators on a CPU: {native.why_not}")
    return "eager" if name == "auto" else name


def fastest_engine(device: torch.device, dtype: torch.dtype) -> str:
    """The engine for runs that are worth a warm-up: captured on a GPU, and on a CPU where the native operators are the fastest
    and a committed result says that it is faster than eager. There eager is next, elsewhere compiled. Where torch.compile does
    not work it is eager, with a warning.

    Args:
        dtype: what the network computes in; torch.int8 as of :class:`ddim_fast.Denoiser`.
    """
    if device.type == "cpu" and native.module is not None and is_faster_in_cpp("conv3x3", torch.float32, "channels_last"):
        if dtype == torch.int8:
            dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
        # PyTorch multiplies bfloat16 by matrix units where there are some; a plan does not.
        by_matrix_units = dtype == torch.bfloat16 and bf16_products() == "amx"
        return "captured" if is_faster_in_cpp("captured", dtype, "channels_last") and not by_matrix_units else "eager"
    problem = why_not_compiled(device)
    if problem is not None:
        warnings.warn(f"torch.compile does not work here, so what runs is slower than it could be: {problem}", stacklevel=2)
        return "eager"
    return "captured" if device.type == "cuda" else "compiled"


def make_engine(name: str, device: torch.device) -> Engine:
    """The engine that ``name``, one of :data:`ENGINES`, means on ``device``.

    Raises:
        ValueError: there is no such engine, or not there.
    """
    captured = CapturedOnCpu if device.type == "cpu" else Captured
    return {"eager": Eager, "compiled": Compiled, "captured": captured}[select_engine(name, device)]()
