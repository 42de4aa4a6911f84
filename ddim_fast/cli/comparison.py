"""Commands that make new images of given ones, batch by batch, into a folder with a picture of before and after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..io.files import atomic_folder, write_json
from ..io.pictures import image_grid, save_image
from ..io.records import COMPARISON, RECORD
from .parser import CommandParser

if TYPE_CHECKING:
    from torch import Tensor

    from .modality import Medium

__all__ = ["change_images", "new_folder", "require_finite", "save_comparison", "write_comparison"]

# More images are unreadable in one grid.
_SHOWN = 20


@contextlib.contextmanager
def new_folder(parser: CommandParser, out: Path) -> Iterator[Path]:
    """:func:`atomic_folder` of ``--out``: a usage error where something is there."""
    try:
        with atomic_folder(out) as folder:
            yield folder
    except FileExistsError as error:
        parser.error(f"--out: {error}")


def change_images(
    change: Callable[[slice], Tensor],
    count: int,
    batch_size: int,
    *,
    noun: str,
    quiet: bool,
    result: str | None = None,
    remedy: str = "--dtype float32",
) -> Tensor:
    """The images that ``change`` makes of ``count`` images, called with a slice of them at a time, under a progress bar.

    Args:
        noun: what the images are called.
        result: what the new ones are called in an error (default: ``noun``).
        remedy: as of :func:`require_finite`.

    Returns:
        (N, C, H, W) on the host.
    """
    import torch

    made = []
    with tqdm(total=count, unit=f" {noun}", disable=quiet) as bar:
        for start in range(0, count, batch_size):
            made.append(change(slice(start, min(start + batch_size, count))).cpu())
            bar.update(len(made[-1]))
    return require_finite(torch.cat(made), result or noun, remedy)


def require_finite(images: Tensor, result: str, remedy: str = "--dtype float32") -> Tensor:
    """The images themselves.

    Args:
        result: what they are called.
        remedy: what to try where they are not finite.

    Raises:
        ValueError: they are not finite.
    """
    if not images.isfinite().all():
        raise ValueError(f"the {result} are not finite; try {remedy}")
    return images


def write_comparison(
    medium: Medium, folder: Path, before: Tensor, after: Tensor, record: dict[str, Any], record_name: str = RECORD
) -> None:
    """A numbered file for each image of ``after``, ``comparison.png`` with the first ones under what they were made of, and the
    record."""
    medium.write(folder, after)
    save_comparison(medium, folder, before, after)
    write_json(folder / record_name, record)


def save_comparison(medium: Medium, folder: Path, *rows: Tensor) -> None:
    """``comparison.png``, a row for the first images of each of ``rows``."""
    import torch

    shown = medium.shown(torch.cat([row[:_SHOWN] for row in rows]))
    picture = image_grid(shown, columns=min(_SHOWN, len(rows[0])))
    save_image(folder / COMPARISON, picture, max(1, medium.width // shown.shape[-1]))
