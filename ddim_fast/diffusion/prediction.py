"""Prediction types: x_0 and epsilon from the network's output, at x_t = signal x_0 + sigma epsilon.

Signal is sqrt(alphas_cumprod) and sigma is sqrt(1 - alphas_cumprod). A network predicts ``epsilon`` (Ho et al. 2020),
``v_prediction``, which is signal epsilon - sigma x_0 (Salimans and Ho 2022), or ``sample``, which is x_0. All conversions are
here, for anything that multiplies and adds: floats, arrays and tensors. Needs no torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = [
    "NO_SIGNAL",
    "PredictionCoefficients",
    "linear_prediction",
    "prediction_coefficients",
    "training_target",
    "x0_and_epsilon",
]

# Below this share there is no signal: divided by its root, values of a sample come near float32's largest.
NO_SIGNAL = 1e-60


class PredictionCoefficients(NamedTuple):
    """x_0 = x0_from_sample x_t + x0_from_output output, and epsilon likewise."""

    x0_from_sample: Any
    x0_from_output: Any
    eps_from_sample: Any
    eps_from_output: Any


def prediction_coefficients(alphas_cumprod: Any, prediction_type: str) -> PredictionCoefficients:
    """x_0 and epsilon as linear combinations of x_t and the network's output, at a noise level.

    Args:
        alphas_cumprod: the noise level of x_t, a float or float64 tensors.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.

    Raises:
        ValueError: the prediction type is unknown, or the output does not determine x_0 or epsilon at this noise level. Only
            floats are checked: reading a tensor would wait for its device.
    """
    a = alphas_cumprod
    if isinstance(a, float) and prediction_type == "epsilon" and a <= NO_SIGNAL:
        raise ValueError(
            f"at zero SNR (alphas_cumprod_t = {a:g}) an epsilon prediction does not determine the image; "
            "use v_prediction or sample"
        )
    if isinstance(a, float) and prediction_type == "sample" and a == 1:
        raise ValueError("without noise (alphas_cumprod_t = 1) a sample prediction does not determine epsilon")
    return linear_prediction(prediction_type, a**0.5, (1 - a) ** 0.5)


def linear_prediction(prediction_type: str, signal: Any, sigma: Any) -> PredictionCoefficients:
    """The same from signal and sigma.

    Raises:
        ValueError: the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return PredictionCoefficients(1 / signal, -sigma / signal, 0.0, 1.0)
    if prediction_type == "v_prediction":
        return PredictionCoefficients(signal, -sigma, sigma, signal)
    if prediction_type == "sample":
        return PredictionCoefficients(0.0, 1.0, 1 / sigma, -signal / sigma)
    raise _unknown(prediction_type)


def x0_and_epsilon(prediction_type: str, output: Any, x: Any, signal: Any, sigma: Any) -> tuple[Any, Any]:
    """The predicted x_0 and epsilon, by diffusers' operations, for the same rounding.

    Raises:
        ValueError: the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return (x - sigma * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x - sigma * output, signal * output + sigma * x
    if prediction_type == "sample":
        return output, (x - signal * output) / sigma
    raise _unknown(prediction_type)


def training_target(prediction_type: str, x0: Any, epsilon: Any, signal: Any, sigma: Any) -> Any:
    """The target of training at x_t = signal x_0 + sigma epsilon.

    Raises:
        ValueError: the prediction type is unknown.
    """
    if prediction_type == "epsilon":
        return epsilon
    if prediction_type == "v_prediction":
        return signal * epsilon - sigma * x0
    if prediction_type == "sample":
        return x0
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type must be epsilon, v_prediction or sample; got {prediction_type!r}")
