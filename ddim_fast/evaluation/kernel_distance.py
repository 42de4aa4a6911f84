"""KID: the kernel distance between two sets of features."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KernelDistance", "kernel_distance", "squared_mmd"]


class KernelDistance(NamedTuple):
    """An unbiased estimate, which may be negative, and its standard error (NaN from a single subset)."""

    value: float
    standard_error: float


def kernel_distance(a: Tensor, b: Tensor, subset_size: int = 1000, subsets: int = 10) -> KernelDistance:
    """KID (Binkowski et al. 2018): the squared maximum mean discrepancy with the kernel (x . y / D + 1)^3, estimated without
    bias. Unlike FID's, its expectation does not depend on the number of images.

    The estimate is the mean over disjoint subsets, whose spread gives an honest standard error. Overlapping subsets, which are
    often used, give one that is too small.

    Args:
        a, b: (N, D) and (M, D) features.
        subset_size: images of each side in a subset; fewer if there would be fewer than ``subsets`` subsets.

    Raises:
        ValueError: there are fewer than two images on a side.
    """
    count = min(len(a), len(b))
    if count < 2:
        raise ValueError(f"KID needs at least 2 images on each side; got {len(a)} and {len(b)}")
    size = max(2, min(subset_size, count // subsets))
    generator = torch.Generator().manual_seed(0)  # data sets may be sorted, by class for instance
    a, b = (features[torch.randperm(len(features), generator=generator)] for features in (a, b))
    parts = range(0, count - size + 1, size)
    values = torch.tensor([squared_mmd(a[i : i + size], b[i : i + size]) for i in parts], dtype=torch.float64)
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return KernelDistance(float(values.mean()), error)


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate (Gretton et al. 2012, eq. 3) from (n, D) and (m, D) features with the kernel (x . y / D + 1)^3."""
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = ((p @ q.T / p.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())
