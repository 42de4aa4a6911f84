import math

import numpy as np
import pytest
import torch

from ddim_fast.evaluation.kernel_distance import kernel_distance, squared_mmd


def features(seed: int, count: int, mean: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(mean, 1, (count, 6))).float()


def test_the_estimate_is_its_definition():
    x, y = features(0, 7), features(1, 5)

    def k(a, b):
        return (float(a.double() @ b.double()) / 6 + 1) ** 3

    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    within += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    between = sum(k(a, b) for a in x for b in y) / 35
    assert squared_mmd(x, y) == pytest.approx(within - 2 * between, rel=1e-12)


def test_it_is_unbiased_for_equal_distributions_and_its_error_is_honest():
    runs = [kernel_distance(features(2 * i, 200), features(2 * i + 1, 200), subset_size=20) for i in range(60)]
    values = np.array([run.value for run in runs])
    z = values / np.array([run.standard_error for run in runs])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(runs))
    assert values.min() < 0 < values.max()
    assert 0.7 < z.std() < 1.6  # 1.13 for ten subsets, if they are independent


def test_different_distributions_are_apart_whatever_their_order():
    a, b = features(0, 300), features(1, 300, mean=1.0)
    found = kernel_distance(a, b, subset_size=30)
    assert found.value > 10 * found.standard_error
    shuffled = kernel_distance(a[torch.randperm(300)], b, subset_size=30)
    assert shuffled.value == pytest.approx(found.value, abs=4 * found.standard_error)


def test_a_single_subset_has_no_error_and_a_single_image_no_distance():
    assert math.isnan(kernel_distance(features(0, 3), features(1, 3)).standard_error)
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(features(0, 1), features(1, 3))
