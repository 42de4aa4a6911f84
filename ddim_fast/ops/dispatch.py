"""Which implementation of an operator runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKENDS", "Implementation", "choose"]

BACKENDS = ("reference", "native", "triton", "cuda")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        backend: one of :data:`BACKENDS`.
        run: computes the operator from a request, whatever that is for the operator.
        why_not: None when this implementation can serve the request, the reason otherwise.
    """

    backend: str
    run: Callable[[Any], Any]
    why_not: Callable[[Any], str | None]


def choose(operator: str, implementations: Sequence[Implementation], request: Any) -> Implementation:
    """The first implementation that can serve ``request``, or the one that DDIM_FAST_BACKEND names.

    Raises:
        ValueError: DDIM_FAST_BACKEND names none, or one that cannot serve; the message says why.
    """
    forced = os.environ.get("DDIM_FAST_BACKEND")
    if not forced:
        return next(i for i in implementations if i.why_not(request) is None)
    if forced not in BACKENDS:
        raise ValueError(f"DDIM_FAST_BACKEND={forced!r} is unknown; choose {', '.join(BACKENDS)}")
    for implementation in implementations:
        if implementation.backend == forced:
            reason = implementation.why_not(request)
            if reason is not None:
                raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: {reason}")
            return implementation
    raise ValueError(f"DDIM_FAST_BACKEND={forced} cannot serve {operator}: it has no such implementation")
