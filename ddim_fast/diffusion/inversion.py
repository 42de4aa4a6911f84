"""From images back to the noise they come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..engine import Denoiser
from ..ops.ddim_step import ddim_step
from .step import step_coefficients

__all__ = ["invert"]


def invert(
    denoise: Denoiser,
    images: Tensor,
    labels: Tensor | None,
    timesteps: np.ndarray,
    alphas_cumprod: np.ndarray,
    prediction_type: str,
) -> Tensor:
    """DDIM inversion: Euler steps of the sampler's ODE towards more noise (Song et al. 2021, eq. 14).

    Each step evaluates the network at the level it starts from. The images themselves are evaluated at the first timestep, the
    cleanest the network knows.

    Args:
        denoise: the network.
        images: (N, C, H, W) float32.
        labels: (N,) or None.
        timesteps: (S,) of the sampler, noisiest first.
        alphas_cumprod: (S + 1,) their noise levels, then that of the images.
        prediction_type: what the network predicts.

    Returns:
        (N, C, H, W) float32: x at ``timesteps[0]``.
    """
    levels = alphas_cumprod[::-1].copy()
    if prediction_type == "sample":
        # Without any noise a sample prediction says nothing of epsilon: the images count as x at the first timestep.
        levels[0] = levels[1]
    evaluated = np.concatenate([timesteps[-1:], timesteps[:0:-1]])
    on_device = torch.from_numpy(evaluated.copy()).to(images.device)
    x = images
    for i in range(len(timesteps)):
        output = denoise(x, on_device[i], labels)
        x = ddim_step(x, output, step_coefficients(float(levels[i]), float(levels[i + 1]), 0.0, prediction_type))
    return x
