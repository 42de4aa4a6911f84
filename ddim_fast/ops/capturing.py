"""Whether a run is being captured on a CPU. Operators then go through torch.library, where the capture sees them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

__all__ = ["capturing", "is_capturing", "is_traced"]

_state = threading.local()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """A context in which :func:`is_capturing` holds in the calling thread."""
    _state.active = True
    try:
        yield
    finally:
        _state.active = False


def is_capturing() -> bool:
    """Whether the calling thread captures a run."""
    return not torch.compiler.is_compiling() and getattr(_state, "active", False)  # compiled code shall not depend on it


def is_traced() -> bool:
    """Whether operators are to be called as torch.library registers them: under torch.compile, or in a capture."""
    return torch.compiler.is_compiling() or is_capturing()
