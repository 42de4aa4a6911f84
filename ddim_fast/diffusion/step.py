"""The coefficients of a DDIM step: plain arithmetic, on floats in float64 or on tensors. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..ops.scalars import plain
from .prediction import prediction_coefficients

__all__ = [
    "SIGMA_HAT",
    "StepCoefficients",
    "check_eta",
    "coefficient_table",
    "posterior_coefficients",
    "step_coefficients",
]

SIGMA_HAT = "sigma-hat"


class StepCoefficients(NamedTuple):
    """One step is

        x_0    = clip(x0_from_sample * x_t + x0_from_output * output)
        eps    = eps_from_sample * x_t + eps_from_output * output
        x_prev = prev_from_x0 * x_0 + prev_from_eps * eps + sigma * noise

    The first two lines convert the network's output, the third takes the step. Each coefficient is a float, or a tensor that
    broadcasts against the sample.
    """

    x0_from_sample: Any
    x0_from_output: Any
    eps_from_sample: Any
    eps_from_output: Any
    prev_from_x0: Any
    prev_from_eps: Any
    sigma: Any


def step_coefficients(
    alphas_cumprod_t: Any, alphas_cumprod_prev: Any, eta: float | str = 0.0, prediction_type: str = "epsilon"
) -> StepCoefficients:
    """The coefficients of the step from x_t to x_prev (Song et al. 2021, eq. 12 and 16).

    Args:
        alphas_cumprod_t, alphas_cumprod_prev: the noise levels at both ends, floats or float64 tensors; a step towards more
            noise (inversion) is one too, with eta = 0.
        eta: 0 is DDIM, 1 the DDPM posterior, ``"sigma-hat"`` the paper's larger variance: the mean of eta = 1 with noise of
            variance 1 - alphas_cumprod_t / alphas_cumprod_prev; no noise if alphas_cumprod_prev is 1, the finished image (Ho et
            al. 2020, algorithm 2).
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: a value is out of range, or the output does not determine x_0 or eps at this noise level. Values in tensors
            are not checked, because reading them would wait for the device.
    """
    a, b = alphas_cumprod_t, alphas_cumprod_prev
    eta = check_eta(eta)
    spread: Any = 1.0 if eta == SIGMA_HAT else eta
    _check_levels(a, b, eta)
    prediction = prediction_coefficients(a, prediction_type)
    if spread == 0:
        return StepCoefficients(*prediction, b**0.5, (1 - b) ** 0.5, 0.0)
    # (1 - b) - sigma^2 with sigma written out: a sum of non-negative terms, so rounding cannot make it negative.
    towards_eps = ((1 - b) * ((1 - spread**2) + spread**2 * a * (1 - b) / (b * (1 - a)))) ** 0.5
    sigma = (1 - a / b) ** 0.5
    sigma = sigma * (b != 1) if eta == SIGMA_HAT else spread * sigma * ((1 - b) / (1 - a)) ** 0.5
    return StepCoefficients(*prediction, b**0.5, towards_eps, sigma)


def coefficient_table(alphas_cumprod: Sequence[float], eta: float | str = 0.0, prediction_type: str = "epsilon") -> np.ndarray:
    """The coefficients of a whole run, computed in float64: the table of :func:`ddim_fast.ddim_step`.

    Args:
        alphas_cumprod: the S + 1 noise levels of S steps, including the one after the last step (1.0).
        eta, prediction_type: as in :func:`step_coefficients`.

    Returns:
        (S, 7) float32.

    Raises:
        ValueError: as :func:`step_coefficients`.
    """
    levels = [float(level) for level in alphas_cumprod]
    rows = [step_coefficients(a, b, eta, prediction_type) for a, b in pairwise(levels)]
    return np.array(rows, np.float32).reshape(-1, 7)


def posterior_coefficients(
    alphas_cumprod_t: float, alphas_cumprod_prev: float, prediction_type: str = "epsilon"
) -> StepCoefficients:
    """The coefficients of DDPM ancestral sampling from x_t to x_prev: mean and variance of q(x_prev | x_t, x_0) (Ho et al.
    2020, eq. 7). It mixes x_0 with x_t itself, so x_t takes the place of eps. Without clipping it equals eta = 1.

    Raises:
        ValueError: as :func:`step_coefficients`.
    """
    a, b = alphas_cumprod_t, alphas_cumprod_prev
    _check_levels(a, b, eta=1.0)
    beta = 1 - a / b
    x0 = prediction_coefficients(a, prediction_type)[:2]
    mean = (b**0.5 * beta / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a))
    return StepCoefficients(*x0, 1.0, 0.0, *mean, (beta * (1 - b) / (1 - a)) ** 0.5)


def check_eta(eta: float | str) -> float | str:
    """``eta`` itself, if it is a number in [0, 1] or ``"sigma-hat"``.

    Raises:
        ValueError: it is neither.
    """
    eta = plain(eta)
    if eta != SIGMA_HAT and (isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 0 <= eta <= 1):
        raise ValueError(f"eta must lie in [0, 1] or be {SIGMA_HAT!r}; got {eta!r}")
    return eta


def _check_levels(a: Any, b: Any, eta: float | str) -> None:
    for name, value in (("alphas_cumprod_t", a), ("alphas_cumprod_prev", b)):
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    if eta != 0 and isinstance(a, float) and isinstance(b, float) and not (a <= b and a < 1 and b > 0):
        raise ValueError(f"a stochastic step must lead to less noise; got alphas_cumprod_t = {a}, alphas_cumprod_prev = {b}")
