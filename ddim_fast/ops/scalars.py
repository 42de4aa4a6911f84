"""Single numbers from a user: Python's, numpy's, or an array or tensor without dimensions."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_finite", "is_whole", "plain"]


def plain(value: Any) -> Any:
    """Python's number for a scalar of numpy or torch; anything else as it is."""
    if isinstance(value, (int, float)):  # before anything that torch.compile cannot ask a number
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_whole(value: Any) -> bool:
    """Whether :func:`plain` made a whole number of it; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether :func:`plain` made a number of it, neither infinite nor NaN nor an integer beyond those."""
    return (is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max
