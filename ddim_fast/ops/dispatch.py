"""The choice of an operator's implementation."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKENDS", "Implementation", "choose", "explain", "server", "why_not_triton"]

BACKENDS = ("reference", "native", "triton", "cuda")

# Every module with operators on tensors imports it; programs that sample without torch do not.
_TORCH_PRIVATE = f"{__package__}.torch_private"

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        backend: one of :data:`BACKENDS`.
        run: computes the operator from a request, a type of the operator's own.
        why_not: None when this implementation can serve the request, the reason otherwise.
        is_faster: whether a committed benchmark says that it is faster than PyTorch where it can serve; not asked when
            DDIM_FAST_BACKEND names it.
    """

    backend: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None]
    is_faster: Callable[[Any], bool] = lambda request: True


def choose(operator: str, implementations: Sequence[Implementation], request: Any) -> Implementation:
    """The first implementation that can serve ``request`` and is faster there, or the one named by DDIM_FAST_BACKEND; the
    reference where :func:`ddim_fast.ops.torch_private.is_observed` holds.

    Raises:
        ValueError: DDIM_FAST_BACKEND names none, or one that cannot serve; the message says why.
    """
    torch_private = sys.modules.get(_TORCH_PRIVATE)
    if torch_private is not None and torch_private.is_observed():
        return next(i for i in implementations if i.backend == "reference")
    forced = os.environ.get("DDIM_FAST_BACKEND")
    if not forced:
        for implementation in implementations:
            if implementation.why_not(request) is None and implementation.is_faster(request):
                return implementation
    if forced not in BACKENDS:
        raise ValueError(f"DDIM_FAST_BACKEND={forced!r} is unknown; choose {', '.join(BACKENDS)}")
    for implementation in implementations:
        if implementation.backend == forced:
            reason = implementation.why_not(request)
            if reason is not None:
                raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: {reason}")
            return implementation
    raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: it has no such implementation")


def server(implementations: Sequence[Implementation], chosen: Implementation) -> str:
    """The name of what computes, for people: the backend's, or "PyTorch" where it is what the reference, listed last, runs."""
    return "PyTorch" if chosen.run is implementations[-1].run else chosen.backend


def explain(operator: str, implementations: Sequence[Implementation], request: Any) -> str:
    """Which implementation :func:`choose` takes, and why none that is listed before it, in words for people.

    Raises:
        ValueError: as :func:`choose` does.
    """
    chosen = choose(operator, implementations, request)
    name = server(implementations, chosen)
    if os.environ.get("DDIM_FAST_BACKEND"):
        return f"{name}, as DDIM_FAST_BACKEND says"
    passed = [i for i in implementations[: implementations.index(chosen)] if server(implementations, i) != "PyTorch"]
    reasons = [f"not {i.backend}: {i.why_not(request) or 'no committed result says that it is faster here'}" for i in passed]
    return "; ".join([name, *reasons])


def why_not_triton(device: Any) -> str | None:
    """Why a Triton kernel cannot take tensors on ``device``, or None. On a CPU it can under Triton's interpreter, which is for
    tests: TRITON_INTERPRET=1, set before Triton is first used."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it needs a GPU, and the tensors are on {device}"
