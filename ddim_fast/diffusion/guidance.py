"""Guidance: a denoiser changed so that it leans towards a condition."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..engine import Denoiser

__all__ = ["check_guidance", "guided"]


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


def guided(denoise: Denoiser, guidance: float | None, num_classes: int | None) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6): none + w (label - none), from one network call on both halves."""
    if guidance is None:
        return denoise

    def denoise_guided(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        both = torch.cat([torch.full_like(labels, num_classes), labels])
        unconditional, conditional = denoise(torch.cat([x, x]), timesteps, both).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    return denoise_guided
