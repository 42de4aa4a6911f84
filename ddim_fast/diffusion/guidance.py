"""Guidance: leaning towards a condition."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["check_guidance"]


def check_guidance(guidance: float | None, labels: Any) -> float | None:
    """The guidance scale, None where it changes nothing.

    Raises:
        ValueError: it is not a finite number, or there are no labels to guide towards.
    """
    if guidance is None or guidance == 1:
        return None
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number; got {guidance!r}")
    if labels is None:
        raise ValueError(f"guidance {guidance} needs class labels to guide towards")
    return float(guidance)
