"""What pictures are compared with: the statistics of a data set, computed once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import atomic_write, cache_folder, naming
from ..processes import Processes
from .frechet import FeatureStatistics
from .inception import FeatureNetwork
from .parts import Parts, make_parts
from .pictures import open_archive, read_array, read_pictures

__all__ = ["KEPT_FEATURES", "Reference", "load_reference"]

# KID and precision/recall compare features, not statistics; these many are enough for them.
KEPT_FEATURES = 10_000


@dataclass(frozen=True)
class Reference:
    """A data set, seen through a feature network.

    Attributes:
        spec: what the user named.
        images: how many there are, or None where the file does not say.
        statistics: of all of them.
        features: (n, D) float32 of some of them, or None where only statistics are known.
        network: the name of the feature network, or None where the file does not say.
        resolution: (H, W) of the pictures, or None where the file does not say.
        content: a checksum of the pictures, or of the file of statistics; empty where it is not known yet.
    """

    spec: str
    images: int | None
    statistics: FeatureStatistics
    features: Tensor | None
    network: str | None
    resolution: tuple[int, int] | None
    content: str = ""

    def check(self, network: FeatureNetwork, resolution: tuple[int, int]) -> None:
        """See that pictures of this resolution, seen through this network, can be compared with it.

        Raises:
            ValueError: they cannot.
        """
        if self.network is not None and self.network != network.name:
            raise ValueError(f"{self.spec}: statistics of the feature network {self.network!r}, not of {network.name!r}")
        if len(self.statistics.mean) != network.features:
            raise ValueError(
                f"{self.spec}: statistics of {len(self.statistics.mean)} features; {network.name} has {network.features}: "
                "they were made with another network"
            )
        if self.resolution is not None and self.resolution != resolution:
            raise ValueError(
                f"{self.spec}: statistics of {self.resolution[0]}x{self.resolution[1]} pictures cannot be compared with "
                f"pictures of {resolution[0]}x{resolution[1]}"
            )

    def save(self, path: Path) -> None:
        """Write it as a ``.npz`` file, which :func:`load_reference` reads."""
        rows, columns = np.triu_indices(len(self.statistics.mean))
        arrays = {
            "mu": self.statistics.mean,
            "sigma_upper": self.statistics.covariance[rows, columns],
            "count": np.int64(self.statistics.count),
            "network": np.str_(self.network),
            "resolution": np.array(self.resolution, np.int64),
        }
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())


def load_reference(
    spec: str,
    image_shape: tuple[int, int, int],
    network: FeatureNetwork,
    processes: Processes,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """The reference that ``spec`` names, checked against what is compared with it. The statistics of a data set are kept in the
    user's cache folder, by the content of its pictures, and computed when they are not there.

    Args:
        spec: a data set, as :func:`read_pictures` takes it, or a ``.npz`` file of statistics: ``mu`` and either ``sigma`` or
            ``sigma_upper`` (the upper triangle, in the order of ``numpy.triu_indices``), unbiased; ``count``, ``network``,
            ``resolution`` and ``features`` where it has them.
        image_shape: (C, H, W) of the pictures to compare; a data set is brought to it as in training.
        progress: called with (pictures done, of how many) while statistics are computed.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: it is damaged, or cannot be compared; the message names it.
    """
    path = Path(spec)
    if path.suffix.lower() == ".npz":
        with open_archive(path) as archive:
            is_statistics = "mu" in archive
        if is_statistics:
            reference = _read_statistics(path)
            reference.check(network, image_shape[1:])
            return replace(reference, content=hashlib.sha256(path.read_bytes()).hexdigest())
    pictures = read_pictures(spec, image_shape)
    key = hashlib.sha256(f"{network.name} {tuple(pictures.shape)} ".encode() + pictures.numpy().tobytes()).hexdigest()[:32]
    cached = cache_folder() / "references" / f"{key}.npz"
    if not processes.from_first(cached.is_file):
        parts = Parts(cached.with_suffix(".parts"), len(pictures), network.features, size=128)
        there = len(pictures) - sum(len(parts.pictures(k)) for k in parts.missing())
        before = processes.add_done(0)

        def count(amount: int) -> None:
            progress(there + processes.add_done(amount) - before, len(pictures))

        make_parts(parts, lambda numbers: network.of(pictures[numbers.start : numbers.stop]), processes, count)
        processes.from_first(lambda: _finish(parts, spec, network, image_shape, cached))
    return replace(_read_statistics(cached), spec=spec, content=key)


def _finish(parts: Parts, spec: str, network: FeatureNetwork, image_shape: tuple[int, int, int], path: Path) -> None:
    Reference(
        spec, parts.count, parts.statistics(network.features), parts.some(KEPT_FEATURES), network.name, image_shape[1:]
    ).save(path)
    parts.remove()


def _read_statistics(path: Path) -> Reference:
    with open_archive(path) as archive:
        arrays = {name: read_array(archive, path, name) for name in archive.files}
    with naming(path):
        if "mu" not in arrays or not {"sigma", "sigma_upper"} & arrays.keys():
            raise ValueError("no statistics: it needs mu, and sigma or sigma_upper")
        mean = arrays["mu"]
        covariance = arrays["sigma"] if "sigma" in arrays else _symmetric(arrays["sigma_upper"], len(mean))
        # Files of other programs do not say of how many images they are; the distance does not depend on it.
        count = int(arrays["count"]) if "count" in arrays else None
        statistics = FeatureStatistics.from_moments(2 if count is None else count, mean, covariance)
        features = arrays.get("features")
        if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
            raise ValueError(f"features of shape {features.shape} do not fit a mean of {len(mean)}")
        resolution = arrays.get("resolution")
        return Reference(
            str(path),
            count,
            statistics,
            None if features is None else torch.from_numpy(features),
            str(arrays["network"]) if "network" in arrays else None,
            None if resolution is None else (int(resolution[0]), int(resolution[1])),
        )


def _symmetric(upper: np.ndarray, size: int) -> np.ndarray:
    if upper.shape != (size * (size + 1) // 2,):
        raise ValueError(f"sigma_upper has the shape {upper.shape}; a mean of {size} needs ({size * (size + 1) // 2},)")
    matrix = np.empty((size, size), upper.dtype)
    rows, columns = np.triu_indices(size)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix
