"""The coefficients of a step of diffusers' DDIM schedulers, with diffusers' rounding or exact."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..diffusion.step import step_coefficients

__all__ = ["StepCoefficients", "between", "why_not_finite"]

# Exact coefficients keep diffusers' float32 values up to this relative error, so that the bits stay the same.
_ROUNDING = 1e-5


class StepCoefficients(NamedTuple):
    """The coefficients of one step, float32 values.

    Attributes:
        signal, noise: sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at the start of the step.
        to_signal, to_noise: sqrt(alphas_cumprod) at its end, and the factor of the predicted noise there, sqrt(1 -
            alphas_cumprod - sigma^2).
        sigma: the standard deviation of the fresh noise.
    """

    signal: float
    noise: float
    to_signal: float
    to_noise: float
    sigma: float


def between(start: Tensor, end: Tensor, eta: float = 0.0, sigma: Tensor | None = None, *, exact: bool) -> StepCoefficients:
    """The coefficients of a step between two noise levels, by diffusers' operations on 0-dim tensors: float64 would round
    differently. With ``exact``, coefficients that lose digits in these operations are computed in float64.

    Raises:
        ValueError: ``exact``, and there is no such step.
    """
    sigma = torch.zeros(()) if sigma is None else sigma
    tensors = (start**0.5, (1 - start) ** 0.5, end**0.5, (1 - end - sigma**2) ** 0.5, sigma)
    rounded = StepCoefficients(*map(float, tensors))
    if not exact:
        return rounded
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1]; got {eta}")
    # A step to its own level, such as from no noise to none, draws no noise.
    c = step_coefficients(float(start), float(end), 0.0 if start == end else eta, "v_prediction")
    right = (c.x0_from_sample, c.eps_from_sample, c.prev_from_x0, c.prev_from_eps, c.sigma)
    return StepCoefficients(*(a if math.isclose(a, b, rel_tol=_ROUNDING) else b for a, b in zip(rounded, right, strict=True)))


def why_not_finite(c: StepCoefficients, prediction_type: str, rederives_epsilon: bool | None) -> str | None:
    """The reason why the result of a step is NaN or infinite, or None.

    Args:
        rederives_epsilon: whether epsilon is computed from the clipped x_0.
    """
    if c.signal > 0 and c.noise > 0 and math.isfinite(c.to_noise) and math.isfinite(c.sigma):
        return None
    if c.signal == 0 and prediction_type == "epsilon":
        return (
            "at zero SNR (alphas_cumprod = 0) epsilon does not determine the image; take a network that predicts v or the "
            "sample, or rescale_betas_zero_snr=False"
        )
    if c.noise == 0 and (prediction_type == "sample" or rederives_epsilon):
        return (
            "without noise (alphas_cumprod = 1) the image does not determine epsilon; take set_alpha_to_one=False, or a "
            "network that predicts epsilon or v, without use_clipped_model_output"
        )
    if math.isnan(c.to_noise) or math.isnan(c.sigma):
        return "in float32 the variance left for epsilon is rounded to below zero; compat='exact' is right here"
    return None
