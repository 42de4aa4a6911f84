"""Where a command writes: its output, in a place that holds nothing else."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..io.pictures import check_channels
from .outputs import Batches, NpzFile, Output, PngFolder, require_empty

if TYPE_CHECKING:
    from ..models.audio import AudioConfig

__all__ = ["free_folder", "output_at", "place_output"]

Kind = TypeVar("Kind", bound=Output)


def output_at(path: Path, batches: Batches, audio: AudioConfig | None) -> Output:
    """A folder of sounds where the images are some, otherwise an .npz file or a folder of pictures.

    Raises:
        ValueError: these images cannot be there.
    """
    if audio is not None:
        from .sound_outputs import WavFolder

        return WavFolder(path, batches, audio)
    if path.suffix.lower() == ".npz":
        return NpzFile(path, batches)
    check_channels(batches.image_shape[2], "--out FILE.npz holds them as they are")
    return PngFolder(path, batches)


def place_output(
    given: Path | None, usual: str, make: Callable[[Path], Kind], record: dict[str, Any]
) -> tuple[Kind, dict[str, Any] | None]:
    """The output of a job, and the record that is there of it.

    Args:
        given: --out; None is the first of the folders ``usual``, ``usual``-2 and so on that holds this job unfinished, or
            nothing.
        make: the output at a path.
        record: of the job.

    Raises:
        ValueError: other things are in the place that is given, or a record is damaged; the message says what to do.
    """
    if given is not None:
        output = make(given)
        there = output.record()
        output.check(there, record)
        return output, there
    for folder in _numbered(usual):
        output = make(folder)
        with contextlib.suppress(ValueError):
            there = output.record()
            output.check(there, record)
            if there is None or not there["finished"]:
                return output, there
    raise AssertionError("there is always another number")


def free_folder(given: Path | None, usual: str) -> Path:
    """The folder of a command that writes it at once: ``given``, or the first of ``usual``, ``usual``-2 ... that is new or
    empty.

    Raises:
        ValueError: other things are in the folder that is given.
    """
    if given is not None:
        require_empty(given)
        return given
    return next(folder for folder in _numbered(usual) if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())))


def _numbered(usual: str) -> Iterator[Path]:
    return (Path(usual if number == 1 else f"{usual}-{number}") for number in itertools.count(1))
