"""The Frechet distance between two sets of features, and the statistics it is made from. NumPy and float64; no torch."""

from __future__ import annotations

import numpy as np

__all__ = ["FeatureStatistics", "frechet_distance"]


class FeatureStatistics:
    """Mean and covariance of features, added batch by batch. It keeps count, mean and the scatter about the mean, not sums of
    squares, which would cancel (Chan, Golub and LeVeque 1979).

    Attributes:
        count: n, the number of rows added.
        mean: (D,) float64.
        scatter: (D, D) float64, the sum of (f - mean)(f - mean)^T.
    """

    def __init__(self, dimensions: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions))

    @classmethod
    def from_moments(cls, count: int, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
        """The statistics of ``count`` rows, from their mean and (unbiased) covariance.

        Raises:
            ValueError: the shapes do not fit each other, a number is not finite, or the covariance is not symmetric.
        """
        mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"a mean of shape {mean.shape} does not fit a covariance of shape {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean and covariance must be finite")
        if np.abs(covariance - covariance.T).max(initial=0) > 1e-6 * np.abs(covariance).max(initial=0):
            raise ValueError("the covariance is not symmetric")
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 rows; got {count}")
        statistics = cls(len(mean))
        statistics.count, statistics.mean, statistics.scatter = count, mean, covariance * (count - 1)
        return statistics

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, unbiased: divided by n - 1.

        Raises:
            ValueError: there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: np.ndarray) -> None:
        """Add (n, D) features.

        Raises:
            ValueError: they are of another width, or not finite.
        """
        rows = np.asarray(features, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"expected features of shape (n, {len(self.mean)}); got {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("a feature is not finite")
        if len(rows):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the rows of ``other``."""
        if other.count:
            self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total, difference = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Frechet (2-Wasserstein) distance of two normal distributions (Dowson and Landau 1982), as in FID (Heusel et
    al. 2017):

        |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^1/2)

    The last trace is the sum of the square roots of the eigenvalues of R^T C_b R, where C_a = R R^T: two symmetric
    eigenproblems. With fewer images than features the covariances are singular. The square root of the product C_a C_b, which
    is not symmetric, would then be ill-conditioned and perhaps complex; this form needs no offset on the diagonal.

    Raises:
        ValueError: their widths differ, or one has fewer than two rows.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} numbers cannot be compared")
    difference = a.mean - b.mean
    covariance_a, covariance_b = a.covariance, b.covariance
    root = _root(covariance_a)
    squared = np.linalg.eigvalsh(root.T @ covariance_b @ root)
    cross = np.sqrt(squared[squared > _negligible(squared)]).sum()
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross
    return max(float(distance), 0.0)  # rounding may make it negative for equal statistics


def _root(covariance: np.ndarray) -> np.ndarray:
    """(D, r) R with R R^T = ``covariance``, r its rank as far as float64 can tell."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > _negligible(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def _negligible(eigenvalues: np.ndarray) -> float:
    """The largest value of a zero eigenvalue after rounding."""
    return max(float(eigenvalues.max(initial=0)), 0.0) * len(eigenvalues) * np.finfo(np.float64).eps
