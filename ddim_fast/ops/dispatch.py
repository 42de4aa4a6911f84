"""The choice of an operator's implementation."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BACKENDS", "Implementation", "choose", "is_observed", "is_transformed", "why_not_triton"]

BACKENDS = ("reference", "native", "triton", "cuda")

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
    reference where :func:`is_observed` holds.

    Raises:
        ValueError: DDIM_FAST_BACKEND names none, or one that cannot serve; the message says why.
    """
    if sys.modules.get("torch") is not None and is_observed():
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


def is_observed() -> bool:
    """Whether PyTorch's operators are being recorded or transformed, so that nothing may be computed without them: under
    torch.export, torch.jit.trace, make_fx, fake tensors, and where :func:`is_transformed` holds."""
    import torch  # not above: programs that sample without torch import this module

    from . import torch_private

    if torch_private.is_exporting():
        return True
    return not torch.compiler.is_compiling() and (torch_private.is_recording() or torch_private.is_transforming())


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, jvp, grad) or forward-mode differentiation is active, in code that is not
    compiled."""
    import torch

    from . import torch_private

    return not torch.compiler.is_compiling() and torch_private.is_transforming()


def why_not_triton(device: Any) -> str | None:
    """Why a Triton kernel cannot take tensors on ``device``, or None. On a CPU it can under Triton's interpreter, which is for
    tests: TRITON_INTERPRET=1, set before Triton is first used."""
    if not _HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"it needs a GPU, and the tensors are on {device}"
