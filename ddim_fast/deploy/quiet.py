"""Silence for exporters and optimisers whose log messages do not concern the caller."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

__all__ = ["errors_only"]


@contextlib.contextmanager
def errors_only(logger: str | None = None) -> Iterator[None]:
    """Inside, the named logger, or the root logger, passes on errors only."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
