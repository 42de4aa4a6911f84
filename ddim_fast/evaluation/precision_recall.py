"""Precision and recall of generated images: the realistic share of them, and the share of real images that they cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PrecisionRecall", "precision_recall"]

# Rows per block of distances.
_ROWS = 2000


class PrecisionRecall(NamedTuple):
    """Both are shares from 0 to 1."""

    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019): precision is the share of generated images whose features lie
    within the distance of some real image to its k-th nearest real neighbour; recall is the same with the sides exchanged. Both
    depend on the numbers of images, so only equal numbers can be compared.

    Args:
        generated, real: (N, D) and (M, D) features, more than k of each.

    Raises:
        ValueError: there are too few images.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"precision and recall need more than {k} images a side; got {len(generated)} and {len(real)}")
    # Centred, so that the expansion of a squared difference loses the fewest digits.
    centre = real.double().mean(0)
    generated, real = (features.double() - centre for features in (generated, real))
    radius_generated, radius_real = (_neighbour_distance(features, k) for features in (generated, real))
    in_real, in_generated = [], torch.zeros(len(real), dtype=torch.bool)
    for rows, start in zip(generated.split(_ROWS), range(0, len(generated), _ROWS), strict=True):
        distance = _squared_distances(rows, real)
        in_real.append((distance <= radius_real).any(dim=1))
        in_generated |= (distance <= radius_generated[start : start + len(rows), None]).any(dim=0)
    return PrecisionRecall(torch.cat(in_real).double().mean().item(), in_generated.double().mean().item())


def _neighbour_distance(features: Tensor, k: int) -> Tensor:
    """(N,) the squared distance of each row to its k-th nearest other row."""
    return torch.cat([_without_self(features, start).kthvalue(k, dim=1).values for start in range(0, len(features), _ROWS)])


def _without_self(features: Tensor, start: int) -> Tensor:
    rows = features[start : start + _ROWS]
    distance = _squared_distances(rows, features)
    i = torch.arange(len(rows))
    distance[i, start + i] = torch.inf
    return distance


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) from (N, D) and (M, D)."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)
