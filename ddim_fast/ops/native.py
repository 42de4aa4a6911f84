"""The compiled module ddim_fast._native, or the reason why it is not there.

Attributes:
    module: the extension module built from csrc/, or None.
    why_not: None, or one sentence for people on why `module` is None.
    has_cuda: whether `module` was built with its CUDA functions; says nothing about a GPU being present.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["has_cuda", "module", "why_not", "why_not_cuda"]

module: Any = None
why_not: str | None = None
try:
    module = importlib.import_module("ddim_fast._native")
except ModuleNotFoundError:
    why_not = (
        "ddim_fast._native was not built: either no C++ compiler worked when ddim_fast was installed (`pip install -v` "
        "shows its messages), or this is a source tree that was never installed with `pip install -e .`"
    )
except ImportError as error:
    why_not = f"ddim_fast._native was built but cannot be loaded: {error}"

has_cuda: bool = hasattr(module, "ddim_step_cuda")


def why_not_cuda() -> str | None:
    """None, or why `module` has no CUDA functions."""
    return why_not if module is None else None if has_cuda else "ddim_fast was built without nvcc"
