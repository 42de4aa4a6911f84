"""The shared part of commands that turn given images into new ones, in a folder with a picture of before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import atomic_folder, write_json
from ..io.pictures import image_grid, save_image
from ..io.progress import Bar
from ..io.records import COMPARISON, RECORD
from ..jobs.places import free_folder
from .parser import CommandParser

if TYPE_CHECKING:
    from torch import Tensor

    from .modality import Medium

__all__ = ["change_images", "new_folder", "require_finite", "save_comparison", "write_comparison"]

# More images are unreadable in one grid.
_SHOWN = 20


@contextlib.contextmanager
def new_folder(parser: CommandParser, given: Path | None, usual: str) -> Iterator[tuple[Path, Path]]:
    """:func:`atomic_folder` in the place that :func:`free_folder` finds; yields the folder to write to and its final place."""
    with parser.usage_errors():
        place = free_folder(given, usual)
    with atomic_folder(place) as folder:
        yield folder, place


def change_images(
    change: Callable[[slice], Tensor],
    count: int,
    batch_size: int,
    *,
    noun: str,
    runs: int,
    quiet: bool,
    result: str | None = None,
    remedy: str = "--dtype float32",
) -> Tensor:
    """The results of ``change`` for ``count`` images, which it takes a slice at a time, under a progress bar.

    Args:
        noun: the name of the images, in the plural.
        runs: as of :class:`Bar`.
        result: the name of the new images in an error (default: ``noun``).
        remedy: as of :func:`require_finite`.

    Returns:
        (N, C, H, W) on the host.
    """
    import torch

    made = []
    with Bar(count, noun, runs=runs, shown=not quiet) as bar:
        for start in range(0, count, batch_size):
            end = min(start + batch_size, count)
            made.append(change(slice(start, end)).cpu())
            bar.made(end)
    return require_finite(torch.cat(made), result or noun, remedy)


def require_finite(images: Tensor, result: str, remedy: str = "--dtype float32") -> Tensor:
    """The images, checked to be finite.

    Args:
        result: the name of the images in the error.
        remedy: the remedy that the error names.

    Raises:
        ValueError: they are not finite.
    """
    if not images.isfinite().all():
        raise ValueError(f"the {result} are not finite; try {remedy}")
    return images


def write_comparison(
    medium: Medium, folder: Path, names: Sequence[str], before: Tensor, after: Tensor, record: dict[str, Any]
) -> None:
    """Write a file for each image of ``after``, ``comparison.png`` with the first ones below their originals, and a record."""
    medium.write(folder, names, after)
    save_comparison(medium, folder, before, after)
    write_json(folder / RECORD, {**record, "finished": True})


def save_comparison(medium: Medium, folder: Path, *rows: Tensor) -> None:
    """Write ``comparison.png``: one row for the first images of each of ``rows``."""
    import torch

    shown = medium.shown(torch.cat([row[:_SHOWN] for row in rows]))
    picture = image_grid(shown, columns=min(_SHOWN, len(rows[0])))
    save_image(folder / COMPARISON, picture, max(1, medium.width // shown.shape[-1]))
