"""Exporters and optimisers that say what is of no use to whoever called us."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["errors_only"]


@contextlib.contextmanager
def errors_only(logger: str | None = None) -> Iterator[None]:
    """Inside, the logger of this name, or the root of all, passes on nothing below an error."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
