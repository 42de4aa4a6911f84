"""One DDIM step. Its coefficients are plain arithmetic, on floats in float64 or on tensors; only the step needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SIGMA_HAT",
    "StepCoefficients",
    "check_eta",
    "fast_ddim_step",
    "posterior_coefficients",
    "step_coefficients",
]

SIGMA_HAT = "sigma-hat"


def fast_ddim_step(
    sample: Tensor,
    model_output: Tensor,
    alphas_cumprod_t: float | Tensor,
    alphas_cumprod_prev: float | Tensor,
    *,
    eta: float | str = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_sample_range: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of the DDIM sampler (Song et al. 2021, eq. 12), for any sampling loop.

    Args:
        sample: x_t, of any shape; float32, float64, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        model_output: the network's prediction at x_t, like ``sample``.
        alphas_cumprod_t: the share of signal variance in ``sample``: alphas_cumprod[t]. A float, a 0-dim tensor, or an (N,)
            tensor with one value an image. A tensor on the GPU is used there, without waiting for it.
        alphas_cumprod_prev: the same for the timestep that comes next in the run; 1.0 after the last one.
        eta: 0 deterministic, 1 the variance of DDPM, anything between, or ``"sigma-hat"`` for the paper's larger variance.
        noise: standard normal noise like ``sample``; needed when ``eta`` is not 0, not read when it is.
        prediction_type: what ``model_output`` is: ``epsilon``, ``v_prediction`` or ``sample``.
        clip_sample_range: clip the predicted x_0 to [-r, r] (epsilon stays as predicted); None does not clip.
        out: where the result goes, like ``sample``; may be one of the inputs. A new tensor by default.

    Returns:
        x_prev, in the dtype of ``sample``.

    Raises:
        ValueError: shapes, dtypes or devices differ, a value is out of range, or noise is missing.
    """
    from ..ops.ddim_step import ddim_step  # here, so that the coefficients are to be had without torch

    stochastic = eta != 0
    if stochastic and noise is None:
        raise ValueError(f"eta = {eta} needs noise")
    if clip_sample_range is not None and not clip_sample_range > 0:
        raise ValueError(f"clip_sample_range must be positive, or None; got {clip_sample_range}")
    a, b = (_level(value, sample) for value in (alphas_cumprod_t, alphas_cumprod_prev))
    coefficients = step_coefficients(a, b, eta, prediction_type)
    return ddim_step(sample, model_output, coefficients, clip_sample_range, noise if stochastic else None, out)


class StepCoefficients(NamedTuple):
    """One step is

        x_0    = clip(x0_from_sample * x_t + x0_from_output * output)
        eps    = eps_from_sample * x_t + eps_from_output * output
        x_prev = prev_from_x0 * x_0 + prev_from_eps * eps + sigma * noise

    The first two lines say what the network's output means, the third where the step leads. Each is a float, or a tensor that
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
        eta: 0 is DDIM, 1 the DDPM posterior, ``"sigma-hat"`` the larger variance the paper writes with a hat: the mean of
            eta = 1 with noise of variance 1 - alphas_cumprod_t / alphas_cumprod_prev.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: a value is out of range, or the output says nothing about x_0 or eps at this noise level. What tensors hold
            is not looked at, because that would wait for the device.
    """
    a, b = alphas_cumprod_t, alphas_cumprod_prev
    spread = 1.0 if check_eta(eta) == SIGMA_HAT else eta
    _check_levels(a, b, eta)
    reading = _reading(a, prediction_type)
    if spread == 0:
        return StepCoefficients(*reading, b**0.5, (1 - b) ** 0.5, 0.0)
    # (1 - b) - sigma^2 with sigma written out: a sum of non-negative terms, so rounding cannot make it negative.
    towards_eps = ((1 - b) * ((1 - spread**2) + spread**2 * a * (1 - b) / (b * (1 - a)))) ** 0.5
    sigma = (1 - a / b) ** 0.5
    if eta != SIGMA_HAT:
        sigma = spread * sigma * ((1 - b) / (1 - a)) ** 0.5
    return StepCoefficients(*reading, b**0.5, towards_eps, sigma)


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
    from_output = _reading(a, prediction_type)[:2]
    mean = (b**0.5 * beta / (1 - a), (a / b) ** 0.5 * (1 - b) / (1 - a))
    return StepCoefficients(*from_output, 1.0, 0.0, *mean, (beta * (1 - b) / (1 - a)) ** 0.5)


def check_eta(eta: float | str) -> float | str:
    """``eta`` itself, if it is a number in [0, 1] or ``"sigma-hat"``.

    Raises:
        ValueError: it is neither.
    """
    if eta != SIGMA_HAT and (isinstance(eta, (str, bool)) or not 0 <= eta <= 1):
        raise ValueError(f"eta must lie in [0, 1] or be {SIGMA_HAT!r}; got {eta!r}")
    return eta


def _level(value: float | Tensor, sample: Tensor) -> float | Tensor:
    """A noise level as a float where that is free, otherwise as a float64 tensor beside ``sample``."""
    import torch

    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.ndim == 0:
        return float(value) if value.device.type == "cpu" and not torch.compiler.is_compiling() else value.double()
    if value.ndim != 1 or sample.ndim == 0 or value.shape[0] not in (1, sample.shape[0]):
        raise ValueError(
            f"a noise level is one number or one an image; got shape {tuple(value.shape)} "
            f"for a sample of shape {tuple(sample.shape)}"
        )
    return value.to(sample.device, torch.float64).view(-1, *[1] * (sample.ndim - 1))


def _reading(a: Any, prediction_type: str) -> tuple[Any, Any, Any, Any]:
    """x_0 and eps as combinations of x_t and the network's output."""
    signal, noise = a**0.5, (1 - a) ** 0.5
    if prediction_type == "epsilon":
        if isinstance(a, float) and a == 0:
            raise ValueError(
                "at zero SNR (alphas_cumprod_t = 0) an epsilon prediction does not determine the image; "
                "use v_prediction or sample"
            )
        return 1 / signal, -noise / signal, 0.0, 1.0
    if prediction_type == "v_prediction":
        return signal, -noise, noise, signal
    if prediction_type == "sample":
        if isinstance(a, float) and a == 1:
            raise ValueError("without noise (alphas_cumprod_t = 1) a sample prediction does not determine epsilon")
        return 0.0, 1.0, 1 / noise, -signal / noise
    raise ValueError(f"prediction_type must be epsilon, v_prediction or sample; got {prediction_type!r}")


def _check_levels(a: Any, b: Any, eta: float | str) -> None:
    for name, value in (("alphas_cumprod_t", a), ("alphas_cumprod_prev", b)):
        if isinstance(value, float) and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    if eta != 0 and isinstance(a, float) and isinstance(b, float) and not (a <= b and a < 1 and b > 0):
        raise ValueError(f"a stochastic step must lead to less noise; got alphas_cumprod_t = {a}, alphas_cumprod_prev = {b}")
