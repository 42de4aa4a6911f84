import numpy as np
import pytest

from ddim_fast.diffusion.prediction import linear_prediction, prediction_coefficients, training_target, x0_and_epsilon

TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("level", [1e-4, 0.3, 0.999])
def test_a_perfect_network_gives_x0_and_epsilon_back(prediction_type, level):
    generator = np.random.default_rng(0)
    x0, epsilon = generator.standard_normal((2, 5))
    signal, sigma = level**0.5, (1 - level) ** 0.5
    x = signal * x0 + sigma * epsilon
    output = training_target(prediction_type, x0, epsilon, signal, sigma)
    np.testing.assert_allclose(x0_and_epsilon(prediction_type, output, x, signal, sigma), (x0, epsilon), rtol=1e-9)
    a, b, c, d = prediction_coefficients(level, prediction_type)
    np.testing.assert_allclose((a * x + b * output, c * x + d * output), (x0, epsilon), rtol=1e-9)


@pytest.mark.parametrize("convert", [linear_prediction, lambda kind, *rest: x0_and_epsilon(kind, 0.0, 0.0, *rest)])
def test_an_unknown_prediction_type_is_named(convert):
    with pytest.raises(ValueError, match="prediction_type must be epsilon, v_prediction or sample; got 'x_0'"):
        convert("x_0", 0.6, 0.8)
    with pytest.raises(ValueError, match="got 'x_0'"):
        training_target("x_0", 0.0, 0.0, 0.6, 0.8)
