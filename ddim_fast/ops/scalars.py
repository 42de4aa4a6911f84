"""Scalars from a user: numbers of Python or numpy, or arrays and tensors without dimensions."""

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
    """Whether a result of :func:`plain` is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a result of :func:`plain` is a number in the range of float64, neither infinite nor NaN."""
    return (is_whole(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max
