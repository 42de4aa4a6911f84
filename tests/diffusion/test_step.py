import math

import numpy as np
import pytest
import torch

from ddim_fast import NoiseSchedule
from ddim_fast.diffusion.step import check_eta, posterior_coefficients, step_coefficients

BARS = NoiseSchedule.linear().alphas_cumprod
PAIRS = [(BARS[999], BARS[949]), (BARS[500], BARS[499]), (BARS[20], BARS[0]), (BARS[0], 1.0), (0.5, 0.5)]
PAIRS = [(float(a), float(b)) for a, b in PAIRS]
TYPES = ["epsilon", "v_prediction", "sample"]


def apply(c, x, output, z):
    """What the coefficients mean, for numbers."""
    x0 = c.x0_from_sample * x + c.x0_from_output * output
    eps = c.eps_from_sample * x + c.eps_from_output * output
    return x0, eps, c.prev_from_x0 * x0 + c.prev_from_eps * eps + c.sigma * z


def network_output(prediction_type, a, x0, eps):
    return {"epsilon": eps, "v_prediction": math.sqrt(a) * eps - math.sqrt(1 - a) * x0, "sample": x0}[prediction_type]


@pytest.mark.parametrize("a,b", PAIRS)
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_step_is_equation_12(eta, prediction_type, a, b):
    x0, eps, z = 0.7, -1.3, 0.4
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
    expected = math.sqrt(b) * x0 + math.sqrt(max(0, 1 - b - sigma**2)) * eps + sigma * z
    output = network_output(prediction_type, a, x0, eps)
    actual = apply(step_coefficients(a, b, eta, prediction_type), x, output, z)
    np.testing.assert_allclose(actual, (x0, eps, expected), rtol=1e-9)


@pytest.mark.parametrize("a,b", PAIRS)
def test_sigma_hat_has_the_mean_of_eta_one_and_the_larger_noise(a, b):
    hat, one = step_coefficients(a, b, "sigma-hat"), step_coefficients(a, b, 1.0)
    assert hat[:-1] == one[:-1]
    if b == 1:  # the image is finished
        assert hat.sigma == one.sigma == 0
    else:
        assert hat.sigma == pytest.approx(math.sqrt(1 - a / b), rel=1e-12)
        assert hat.sigma >= one.sigma


@pytest.mark.parametrize("a,b", PAIRS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_variance_after_a_step_is_that_of_its_noise_level(eta, a, b):
    c = step_coefficients(a, b, eta)
    assert c.prev_from_x0**2 == pytest.approx(b, rel=1e-12)
    assert c.prev_from_eps**2 + c.sigma**2 == pytest.approx(1 - b, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("a,b", PAIRS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_posterior_is_ho_et_al_equation_7(prediction_type, a, b):
    x0, eps, z = 0.7, -1.3, 0.4
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    alpha = a / b
    mean = math.sqrt(b) * (1 - alpha) / (1 - a) * x0 + math.sqrt(alpha) * (1 - b) / (1 - a) * x
    expected = mean + math.sqrt((1 - b) / (1 - a) * (1 - alpha)) * z
    output = network_output(prediction_type, a, x0, eps)
    actual = apply(posterior_coefficients(a, b, prediction_type), x, output, z)
    np.testing.assert_allclose(actual, (x0, x, expected), rtol=1e-9)
    np.testing.assert_allclose(actual[2], apply(step_coefficients(a, b, 1.0, prediction_type), x, output, z)[2], rtol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "sigma-hat"])
def test_a_step_to_its_own_level_changes_nothing(eta):
    _, _, after = apply(step_coefficients(0.3, 0.3, eta), 0.9, -0.2, 5.0)
    assert after == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("eta", [0.0, 1.0, "sigma-hat"])
def test_the_last_step_returns_the_predicted_image(eta, prediction_type):
    x0, _, after = apply(step_coefficients(0.4, 1.0, eta, prediction_type), 0.9, -0.2, 5.0)
    assert after == pytest.approx(x0, rel=1e-12)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0, "sigma-hat"])
def test_steps_from_pure_noise_are_finite(eta, prediction_type):
    assert all(math.isfinite(v) for v in step_coefficients(0.0, 0.2, eta, prediction_type))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_step_back_undoes_a_step(prediction_type):
    x0, eps = 0.7, -1.3
    x = math.sqrt(0.2) * x0 + math.sqrt(0.8) * eps
    _, _, cleaner = apply(step_coefficients(0.2, 0.6), x, eps, 0)
    _, _, back = apply(step_coefficients(0.6, 0.2), cleaner, eps, 0)
    assert back == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "sigma-hat"])
def test_tensors_give_the_numbers_of_floats(eta, prediction_type):
    a, b = (torch.tensor(levels, dtype=torch.float64) for levels in zip(*PAIRS, strict=True))
    ours = step_coefficients(a, b, eta, prediction_type)
    for i, pair in enumerate(PAIRS):
        expected = step_coefficients(*pair, eta, prediction_type)
        for value, number in zip(ours, expected, strict=True):
            assert float(value[i] if isinstance(value, torch.Tensor) else value) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((1.2, 1.0), r"alphas_cumprod_t must lie in \[0, 1\]; got 1.2"),
        ((0.5, -0.1), r"alphas_cumprod_prev must lie in \[0, 1\]; got -0.1"),
        ((float("nan"), 0.5), r"alphas_cumprod_t must lie in \[0, 1\]; got nan"),
        ((0.5, 0.4, 0.5), "a stochastic step must lead to less noise"),
        ((1.0, 1.0, 0.5), "a stochastic step must lead to less noise"),
        ((0.0, 0.0, 1.0, "v_prediction"), "a stochastic step must lead to less noise"),
        ((0.0, 0.0, "sigma-hat", "sample"), "a stochastic step must lead to less noise"),
        ((0.0, 0.5), "at zero SNR .* use v_prediction or sample"),
        ((1.0, 0.5, 0.0, "sample"), "without noise"),
        ((0.5, 0.6, 0.0, "eps"), "prediction_type must be epsilon, v_prediction or sample; got 'eps'"),
        ((0.5, 0.6, 2.0), r"eta must lie in \[0, 1\] or be 'sigma-hat'; got 2.0"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_coefficients(*arguments)


@pytest.mark.parametrize("arguments", [(0.5, 0.4), (1.0, 1.0), (0.0, 0.0, "sample"), (0.5, 1.1), (0.0, 0.1), (0.5, 0.6, "eps")])
def test_the_posterior_refuses_the_same(arguments):
    with pytest.raises(ValueError):
        posterior_coefficients(*arguments)


@pytest.mark.parametrize("eta", [-0.01, 1.01, float("nan"), float("inf"), "ddim", "1", True])
def test_eta_is_a_share_or_sigma_hat(eta):
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        check_eta(eta)
