"""Lines about what a command does."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["describe_model", "notice"]

_PATIENCE = 1.0  # seconds


@contextlib.contextmanager
def notice(text: str, quiet: bool = False) -> Iterator[None]:
    """Inside, what takes longer than a second is named by a line, where stderr is a terminal, at which somebody waits.

    Args:
        quiet: print nothing.
    """
    timer = threading.Timer(_PATIENCE, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if not quiet and sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def describe_model(name: str, model: nn.Module, dtype: str, device: torch.device) -> str:
    """A line: the model's name and size, and what it computes in."""
    return f"model: {name}, {sum(p.numel() for p in model.parameters()):,} parameters, {dtype} on {device}"
