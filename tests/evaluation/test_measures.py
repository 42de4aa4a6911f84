import numpy as np
import pytest

from ddim_fast.evaluation import measures


def test_the_root_of_a_mean_and_its_standard_error():
    """Against many means of as many numbers each."""
    numbers = np.random.default_rng(0).gamma(3.0, size=(2000, 100)).astype(np.float32)
    found = measures._root_mean("x", numbers[0])
    assert found["x"] == pytest.approx(numbers[0].mean() ** 0.5, rel=1e-6)
    assert found["x standard error"] == pytest.approx((numbers.mean(axis=1) ** 0.5).std(), rel=0.25)
