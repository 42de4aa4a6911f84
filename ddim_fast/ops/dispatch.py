"""Which implementation of an operator runs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKENDS", "Implementation", "choose", "is_exporting", "why_not_triton"]

BACKENDS = ("reference", "native", "triton", "cuda")

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        backend: one of :data:`BACKENDS`.
        run: computes the operator from a request, whatever that is for the operator.
        why_not: None when this implementation can serve the request, the reason otherwise.
        pays: whether it is worth its while where it can serve; not asked when DDIM_FAST_BACKEND names it.
    """

    backend: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None]
    pays: Callable[[Any], bool] = lambda request: True


def choose(operator: str, implementations: Sequence[Implementation], request: Any) -> Implementation:
    """The first implementation that can serve ``request`` and pays, or the one that DDIM_FAST_BACKEND names.

    Raises:
        ValueError: DDIM_FAST_BACKEND names none, or one that cannot serve; the message says why.
    """
    forced = os.environ.get("DDIM_FAST_BACKEND")
    if not forced:
        return next(i for i in implementations if i.why_not(request) is None and i.pays(request))
    if forced not in BACKENDS:
        raise ValueError(f"DDIM_FAST_BACKEND={forced!r} is unknown; choose {', '.join(BACKENDS)}")
    for implementation in implementations:
        if implementation.backend == forced:
            reason = implementation.why_not(request)
            if reason is not None:
                raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: {reason}")
            return implementation
    raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: it has no such implementation")


def is_exporting() -> bool:
    """Whether torch.export is at work, for code that torch.compile traces: before torch 2.13, it takes
    ``torch.compiler.is_exporting()`` for true whatever it compiles."""
    import torch  # not above: who samples without torch reads this module

    return torch.compiler._is_exporting_flag


def why_not_triton(device: Any) -> str | None:
    """Why a Triton kernel cannot take tensors on ``device``, or None. On a CPU it can under Triton's interpreter, which is for
    tests: TRITON_INTERPRET=1, set before Triton is first used."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it needs a GPU, and the tensors are on {device}"
