"""Execution of sampling runs: eager, compiled, or captured in one CUDA graph. An engine executes functions of tensors and knows
nothing of networks, guidance or solvers."""

from __future__ import annotations

import warnings

import torch

from ..ops import native
from ..ops.measured import is_faster_in_cpp
from .captured import Captured
from .captured_cpu import CapturedOnCpu
from .compiled import Compiled, why_not_compiled
from .eager import Eager
from .inference import inference

__all__ = [
    "ENGINES",
    "Engine",
    "cpp_is_fastest",
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
            raise ValueError(f"the captured engine is for CUDA and CPUs, but the network is on {device}; choose eager or compiled")
        if device.type == "cpu" and native.module is None:
            raise ValueError(f"the captured engine needs the C++ operators on a CPU: {native.why_not}")
    return "eager" if name == "auto" else name


def cpp_is_fastest(device: torch.device) -> bool:
    """Whether the native operators leave torch.compile nothing to gain, as measured (docs/engines.md)."""
    if device.type != "cpu" or native.module is None:
        return False
    return is_faster_in_cpp("conv3x3", torch.float32, "channels_last")


def fastest_engine(device: torch.device) -> str:
    """The engine for a run that is worth a warm-up: captured on a GPU. On a CPU it is eager where the native operators
    are the fastest, otherwise compiled. Where torch.compile does not work it is eager, with a warning."""
    if cpp_is_fastest(device):
        return "eager"
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
