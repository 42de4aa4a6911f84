"""The reference of FID and KID: the features of a data set, computed once."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.files import atomic_write, cache_folder, errors_name_file
from ..io.processes import Processes
from .frechet import FeatureStatistics
from .inception import FeatureNetwork
from .pictures import Survey, check_pictures, describe, open_archive, read_array, stored_pictures, survey
from .shards import Shards, alone, make_shards

__all__ = ["KEPT_FEATURES", "Reference", "check_reference", "load_reference"]

# KID and precision/recall compare this many features at most.
KEPT_FEATURES = 10_000


@dataclass(frozen=True)
class Reference:
    """The features of a data set and their statistics.

    Attributes:
        spec: the name that the user gave.
        images: their number, or None if the file does not give it.
        statistics: of all images.
        features: (n, D) float32 of some images, or None if only statistics are known.
        network: the name of the feature network, or None if the file does not give it.
        resolution: (H, W) of the pictures, or None if they differ or the file does not give it.
        content: a checksum of the pictures or of the file of statistics; empty if not known yet.
        pictures: their sizes and colours in words, if they differ from the images'; otherwise empty.
    """

    spec: str
    images: int | None
    statistics: FeatureStatistics
    features: Tensor | None
    network: str | None
    resolution: tuple[int, int] | None
    content: str = ""
    pictures: str = ""

    def check(self, network: FeatureNetwork, resolution: tuple[int, int] | None) -> None:
        """Check that features of this network, of pictures of this resolution (if known), can be compared with it.

        Raises:
            ValueError: they cannot be compared.
        """
        if self.network is not None and self.network != network.name:
            raise ValueError(f"{self.spec}: statistics of the feature network {self.network!r}, not of {network.name!r}")
        if len(self.statistics.mean) != network.features:
            raise ValueError(
                f"{self.spec}: statistics of {len(self.statistics.mean)} features; {network.name} has {network.features}: "
                "they were made with another network"
            )
        if self.resolution is not None and resolution is not None and self.resolution != resolution:
            raise ValueError(
                f"{self.spec}: statistics of {self.resolution[0]}x{self.resolution[1]} pictures cannot be compared with "
                f"pictures of {resolution[0]}x{resolution[1]}"
            )

    def save(self, path: Path) -> None:
        """Write it as a ``.npz`` file, which :func:`load_reference` reads."""
        rows, columns = np.triu_indices(len(self.statistics.mean))
        arrays: dict[str, Any] = {
            "mu": self.statistics.mean,
            "sigma_upper": self.statistics.covariance[rows, columns],
            "count": self.images,
            "network": self.network,
            "resolution": self.resolution,
            "features": None if self.features is None else self.features.numpy(),
        }
        arrays = {name: np.asarray(value) for name, value in arrays.items() if value is not None}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, buffer.getvalue())


def check_reference(spec: str, network: FeatureNetwork, image_shape: tuple[int, int, int] | None = None) -> None:
    """Check, without computing anything, that :func:`load_reference` can read ``spec``: a whole file of matching statistics, or
    a first picture. Arguments and errors as there; an ``image_shape`` of None is not compared."""
    path = Path(spec)
    if _holds_statistics(path):
        _read_statistics(path, image_shape).check(network, None if image_shape is None else image_shape[1:])
    else:
        next(stored_pictures(spec))


def load_reference(
    spec: str,
    image_shape: tuple[int, int, int],
    network: FeatureNetwork,
    processes: Processes,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """The reference that ``spec`` names, checked to be comparable. Statistics of a data set are kept in the user's cache folder
    by the content of its pictures, and computed if missing.

    Args:
        spec: a data set, as :func:`read_pictures` takes it, or a ``.npz`` file of statistics: ``mu`` and either ``sigma`` or
            ``sigma_upper`` (the upper triangle, in the order of ``numpy.triu_indices``), unbiased; ``count``, ``network``,
            ``resolution`` and ``features`` where it has them.
        image_shape: (C, H, W) of the pictures to compare. Pictures in a ``.npz`` file must have that shape too. Other data sets
            may have any sizes and colours; the network resizes all pictures.
        progress: called with (pictures done, pictures in all) while statistics are computed.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: it is damaged, or cannot be compared; the message names it.
    """
    path = Path(spec)
    if _holds_statistics(path):
        reference = _read_statistics(path, image_shape)
        reference.check(network, image_shape[1:])
        return replace(reference, content=hashlib.sha256(path.read_bytes()).hexdigest())
    found = processes.from_first(lambda: survey(stored_pictures(spec)))
    differs = found.shapes != {image_shape}
    if _is_archive(path) and differs:
        raise ValueError(f"{path}: its pictures are {describe(found.shapes)}, not {describe([image_shape])}")
    if found.count < 2:
        raise ValueError(f"{spec}: statistics need at least 2 pictures; there is {found.count}")
    key = hashlib.sha256(f"{network.name} {found.content}".encode()).hexdigest()[:32]
    cached = cache_folder() / "references" / f"{key}.npz"
    parts = Shards(cached.with_suffix(".parts"), found.count, network.features, size=128)
    if not processes.from_first(lambda: _is_kept(cached, network)):
        with alone(parts, processes):
            if not processes.from_first(lambda: _is_kept(cached, network)):  # by now another run may have made it
                there = found.count - sum(len(parts.pictures(k)) for k in parts.missing())
                before = processes.add_done(0)

                def count(amount: int) -> None:
                    progress(there + processes.add_done(amount) - before, found.count)

                make_shards(parts, _features(spec, network), processes, count)
                processes.from_first(lambda: _finish(parts, spec, network, found, cached))
    pictures = describe(found.shapes) if differs else ""
    return replace(_read_statistics(cached), spec=spec, content=found.content, pictures=pictures)


def _is_kept(path: Path, network: FeatureNetwork) -> bool:
    """Whether the cache folder has these statistics; a damaged file is as good as none."""
    try:
        _read_statistics(path).check(network, None)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _is_archive(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _holds_statistics(path: Path) -> bool:
    if not _is_archive(path):
        return False
    with open_archive(path) as archive:
        return "mu" in archive


def _features(spec: str, network: FeatureNetwork) -> Callable[[range], Tensor]:
    """The features of the pictures of these numbers; the ranges must come in order."""
    pictures = enumerate(stored_pictures(spec))

    def part(numbers: range) -> Iterator[Tensor]:
        for number, picture in pictures:
            if number in numbers:
                yield picture
            if number == numbers[-1]:
                return
        raise ValueError(f"{spec}: its pictures changed while they were read")

    return lambda numbers: network.of(part(numbers))


def _finish(parts: Shards, spec: str, network: FeatureNetwork, found: Survey, path: Path) -> None:
    sizes = {(height, width) for _, height, width in found.shapes}
    resolution = sizes.pop() if len(sizes) == 1 else None
    features = parts.some(KEPT_FEATURES)
    Reference(spec, parts.count, parts.statistics(network.features), features, network.name, resolution).save(path)
    parts.remove()


def _read_statistics(path: Path, image_shape: tuple[int, int, int] | None = None) -> Reference:
    """The statistics of a file; its pictures, if it has any, must be (C, H, W)."""
    with open_archive(path) as archive:
        arrays = {name: read_array(archive, path, name) for name in (*_RANKS, "network", "arr_0") if name in archive}
    if image_shape is not None and "arr_0" in arrays:
        check_pictures(path, arrays["arr_0"], image_shape)
    with errors_name_file(path):
        if "mu" not in arrays or not {"sigma", "sigma_upper"} & arrays.keys():
            raise ValueError("no statistics in it: it needs the arrays mu and either sigma or sigma_upper")
        for name, rank in _RANKS.items():
            if name not in arrays:
                continue
            array = arrays[name]
            if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite numbers")
            if rank not in (None, array.ndim):
                raise ValueError(f"{name} must have {rank} {'axis' if rank == 1 else 'axes'}; it has the shape {array.shape}")
        mean = arrays["mu"]
        covariance = arrays["sigma"] if "sigma" in arrays else _symmetric(arrays["sigma_upper"], len(mean))
        # Files of other programs do not give the number of images; the distance does not depend on it.
        count = int(arrays["count"].item()) if "count" in arrays else None
        statistics = FeatureStatistics.from_moments(2 if count is None else count, mean, covariance)
        features = arrays.get("features")
        if features is not None and features.shape[1] != len(mean):
            raise ValueError(f"features of shape {features.shape} do not fit a mean of {len(mean)}")
        resolution = arrays.get("resolution")
        if resolution is not None and len(resolution) != 2:
            raise ValueError(f"resolution must be a height and a width; it has the shape {resolution.shape}")
        return Reference(
            str(path),
            count,
            statistics,
            None if features is None else torch.from_numpy(features),
            str(arrays["network"]) if "network" in arrays else None,
            None if resolution is None else (int(resolution[0]), int(resolution[1])),
        )


# Arrays in a file of statistics and their numbers of axes; other programs may keep the count with any.
_RANKS = {"mu": 1, "sigma": 2, "sigma_upper": 1, "count": None, "features": 2, "resolution": 1}


def _symmetric(upper: np.ndarray, size: int) -> np.ndarray:
    if upper.shape != (size * (size + 1) // 2,):
        raise ValueError(f"sigma_upper has the shape {upper.shape}; a mean of {size} needs ({size * (size + 1) // 2},)")
    matrix = np.empty((size, size), upper.dtype)
    rows, columns = np.triu_indices(size)
    matrix[rows, columns] = upper
    matrix[columns, rows] = upper
    return matrix
