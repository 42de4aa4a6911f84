"""From images back to the noise they come from."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .solvers import DDIMUpdate
from .step import step_coefficients

__all__ = ["inversion"]


def inversion(timesteps: np.ndarray, alphas_cumprod: np.ndarray, prediction_type: str) -> tuple[np.ndarray, DDIMUpdate]:
    """DDIM inversion: Euler steps of the sampler's ODE towards more noise (Song et al. 2021, eq. 14).

    Each step evaluates the network at the level it starts from. The images themselves are evaluated at the first timestep, the
    cleanest the network knows.

    Args:
        timesteps: (S,) of the sampler, noisiest first.
        alphas_cumprod: (S + 1,) their noise levels, then that of the images.
        prediction_type: what the network predicts.

    Returns:
        The timesteps at which the network is evaluated, in order, and the steps: from images to x at ``timesteps[0]``.
    """
    levels = alphas_cumprod[::-1].copy()
    if prediction_type == "sample":
        # Without any noise a sample prediction says nothing of epsilon: the images count as x at the first timestep.
        levels[0] = levels[1]
    evaluated = np.concatenate([timesteps[-1:], timesteps[:0:-1]])
    pairs = pairwise(float(level) for level in levels)
    return evaluated, DDIMUpdate([step_coefficients(a, b, 0.0, prediction_type) for a, b in pairs])
