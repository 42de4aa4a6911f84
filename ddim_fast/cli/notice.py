"""A line about what takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

__all__ = ["notice"]

_PATIENCE = 2.0  # seconds


@contextlib.contextmanager
def notice(text: str, quiet: bool = False) -> Iterator[None]:
    """Inside, what takes longer than two seconds is named by a line on stderr; what is fast is not worth one.

    Args:
        quiet: print nothing.
    """
    timer = threading.Timer(_PATIENCE, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
