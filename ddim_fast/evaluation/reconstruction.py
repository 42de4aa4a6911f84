"""The error of images that are encoded to noise and decoded again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.sampler import Sampler

__all__ = ["reconstruction_error"]


def reconstruction_error(sampler: Sampler, images: Tensor, labels: Tensor | None = None, batch_size: int = 64) -> Tensor:
    """Encode in S steps, decode in S steps: Song et al. 2021, section 5.4 and table 2.

    Args:
        sampler: a deterministic sampler of S steps.
        images: (N, C, H, W) float32 in [-1, 1].
        labels: (N,) int64, or None.

    Returns:
        (N,) float64: the mean squared error per dimension of each image, in units of [0, 1].
    """
    errors = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].to(sampler.device)
        classes = None if labels is None else labels[start : start + batch_size]
        latents = sampler.encode(batch, labels=classes)
        decoded = sampler.sample(x_T=latents, labels=classes, batch_size=batch_size)
        errors.append(((decoded - batch) / 2).double().square().mean(dim=(1, 2, 3)).cpu())
    return torch.cat(errors)
