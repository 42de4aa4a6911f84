"""The denoising error of a network on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..diffusion.prediction import x0_and_epsilon
from ..diffusion.schedule import NoiseSchedule
from ..engine import inference
from ..models.unet import UNet
from ..ops.noise import seeded_noise

__all__ = ["by_noise", "denoising_error", "spread_timesteps"]


def spread_timesteps(count: int, total: int) -> Tensor:
    """(count,) int64 timesteps in 0..total-1, spread evenly, in a fixed random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    timesteps = torch.empty(count, dtype=torch.int64)
    timesteps[order] = torch.arange(count) * total // count
    return timesteps


@inference()
def denoising_error(
    network: UNet, images: Tensor, labels: Tensor | None, timesteps: Tensor, seeds: Sequence[int], batch_size: int = 64
) -> Tensor:
    """The loss of each image (Ho et al. 2020, eq. 14): the mean squared error of the predicted noise, for any prediction type.

    Args:
        network: on the device to compute on.
        images: (N, C, H, W) float32 in [-1, 1].
        labels: (N,) int64, or None.
        timesteps: (N,) int64, the noise level of each; with those of :func:`spread_timesteps` the mean is the loss.
        seeds: N integers: the noise of each.

    Returns:
        (N,) float64.
    """
    config, device = network.config, network.device
    bar = NoiseSchedule.from_config(config).alphas_cumprod
    levels = torch.from_numpy(np.stack([np.sqrt(bar), np.sqrt(1 - bar)])).float().to(device)
    errors = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x0, t = images[part].to(device), timesteps[part].to(device)
        a, s = levels[:, t, None, None, None]
        noise = seeded_noise(seeds[part], 0, config.image_shape, device)
        x = a * x0 + s * noise
        classes = None if labels is None else labels[part].to(device)
        output = network(x.contiguous(memory_format=torch.channels_last), t, classes).float()
        _, predicted = x0_and_epsilon(config.prediction_type, output, x, a, s)
        errors.append((predicted - noise).double().square().mean(dim=(1, 2, 3)).cpu())
    return torch.cat(errors)


def by_noise(errors: np.ndarray, timesteps: np.ndarray, total: int) -> dict[str, float | None]:
    """Mean errors by range of timesteps, from low noise to high: a network can be good at one end and bad at the other.

    Args:
        errors, timesteps: (N,) each.
        total: T, the number of training timesteps.

    Returns:
        the mean for timesteps "0-9", "10-29", "30-99", "100-299" and "300-999" if T is 1000, the same shares of another T; None
        where there is no image.
    """
    edges = [total * share // 100 for share in (0, 1, 3, 10, 30, 100)]
    means: dict[str, float | None] = {}
    for low, high in pairwise(sorted(set(edges))):
        found = errors[(timesteps >= low) & (timesteps < high)]
        means[f"{low}-{high - 1}"] = float(found.mean(dtype=float)) if len(found) else None
    return means
