"""Numbers of many pictures, computed in shards by several processes and kept on disk until they are complete."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..io.files import atomic_write
from ..io.locks import holding, release
from ..io.processes import Processes
from ..io.stopping import signals
from .frechet import FeatureStatistics

__all__ = ["Shards", "alone", "drawn", "make_shards"]


class Shards:
    """A folder with one row of float32 numbers per picture, such as its features, in one file per part. Files are written whole
    or not at all: a killed run continues from them, and the processes of a run work on different parts.

    Args:
        folder: created with the first part.
        count: the number of pictures.
        width: numbers per picture.
        size: pictures per part.
    """

    def __init__(self, folder: Path, count: int, width: int, size: int) -> None:
        self.folder, self.count, self.width, self.size = folder, count, width, size

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def pictures(self, k: int) -> range:
        """The range of pictures in part k."""
        return range(k * self.size, min(self.count, (k + 1) * self.size))

    def missing(self) -> list[int]:
        """The missing parts."""
        return [k for k in range(len(self)) if not self._is_whole(k)]

    def write(self, k: int, rows: np.ndarray) -> None:
        """Write the float32 rows of part k."""
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, rows)
        atomic_write(self._file(k), buffer.getvalue())

    def read(self, k: int) -> np.ndarray:
        """The rows of part k, which must exist."""
        return np.load(self._file(k))

    def all(self) -> np.ndarray:
        """(count, width) float32: the rows of all parts."""
        return np.concatenate([self.read(k) for k in range(len(self))])

    def statistics(self, width: int) -> FeatureStatistics:
        """Mean and covariance of the first ``width`` numbers of all rows, added in the order of the pictures."""
        statistics = FeatureStatistics(width)
        for k in range(len(self)):
            statistics.update(self.read(k)[:, :width])
        return statistics

    def some(self, limit: int) -> Tensor:
        """The rows of ``limit`` pictures, or of all if there are fewer: a fixed random choice, because data sets may be
        sorted."""
        chosen = _choice(self.count, limit).numpy()
        rows = [self.read(k)[chosen[(chosen >= p.start) & (chosen < p.stop)] - p.start] for k, p in self._parts()]
        return torch.from_numpy(np.concatenate(rows))

    def remove(self) -> None:
        """Remove the folder, and release it where this process holds it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        release(self.folder)

    def _parts(self) -> list[tuple[int, range]]:
        return [(k, self.pictures(k)) for k in range(len(self))]

    def _file(self, k: int) -> Path:
        # The name depends on the content: another number of pictures per part is another file.
        pictures = self.pictures(k)
        return self.folder / f"part-{pictures.start:06d}-{pictures.stop - 1:06d}.npy"

    def _is_whole(self, k: int) -> bool:
        try:
            stored = np.load(self._file(k), mmap_mode="r")
        except Exception:  # numpy raises any exception for a damaged file
            return False
        return stored.dtype == np.float32 and stored.shape == (len(self.pictures(k)), self.width)


@contextlib.contextmanager
def alone(parts: Shards, processes: Processes) -> Iterator[None]:
    """Inside, no other run makes these parts; before, wait until none does."""
    with contextlib.ExitStack() as held:
        processes.from_first(lambda: held.enter_context(holding(parts.folder, str(parts.folder))))
        yield


def drawn(rows: Tensor, limit: int) -> Tensor:
    """``limit`` of the rows, or all if there are fewer: a fixed random choice, in their order."""
    return rows[_choice(len(rows), limit)]


def _choice(count: int, limit: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def make_shards(
    parts: Shards,
    rows: Callable[[range], Tensor],
    processes: Processes,
    on_pictures: Callable[[int], None] = lambda count: None,
) -> None:
    """Compute the missing parts, each process its share, and wait for all of them.

    Args:
        rows: from a range of pictures to their (n, width) numbers.
        on_pictures: called with the number of pictures of each part that is made.

    Raises:
        ValueError: a number is not finite.
    """
    for k in signals.each(processes.share(processes.from_first(parts.missing)), "batch"):
        numbers = parts.pictures(k)
        made = rows(numbers)
        if not torch.isfinite(made).all():
            raise ValueError(
                f"the numbers computed for pictures {numbers.start} to {numbers.stop - 1} are not finite; try --dtype float32"
            )
        parts.write(k, made.float().cpu().numpy())
        on_pictures(len(numbers))
    processes.wait()
