import numpy as np
import pytest
import torch

from ddim_fast.evaluation import precision_recall as module
from ddim_fast.evaluation.precision_recall import precision_recall


def features(seed: int, count: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (count, 4))).float()


def by_definition(generated, real, k):
    def share(points, centres):
        between = torch.cdist(centres.double(), centres.double())
        radius = between.sort(dim=1).values[:, k]  # the first is the centre itself
        return (torch.cdist(points.double(), centres.double()) <= radius).any(1).double().mean().item()

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3])
def test_it_is_its_definition_in_pieces_too(k, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 7)
    generated, real = features(0, 40, 0.7) + 100, features(1, 33) + 100
    assert precision_recall(generated, real, k) == pytest.approx(by_definition(generated, real, k))


def test_the_ends_of_the_scale():
    x = features(0, 50)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 1000, x) == (0, 0)
    narrow = precision_recall(features(1, 200, 0.05), features(2, 200))
    assert narrow.precision > 0.95 and narrow.recall < 0.2


def test_too_few_images_are_an_error():
    with pytest.raises(ValueError, match="more than 3 images a side; got 3 and 50"):
        precision_recall(features(0, 3), features(1, 50))
