"""Where a command writes: its output, in a place that holds nothing else."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..io.locks import Held, hold, release
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
    """The output of a job, in which this process alone writes from here on, and the record that is there of it.

    Args:
        given: --out; None is the first of the folders ``usual``, ``usual``-2 and so on that holds this job unfinished, or
            nothing, and in which no other process writes.
        make: the output at a path.
        record: of the job.

    Raises:
        ValueError: other things are in the place that is given, or a record is damaged; the message says what to do.
        ddim_fast.io.locks.Held: another process writes there.
    """
    if given is not None:
        output = make(given)
        return output, _taken(output, record)
    for folder in _numbered(usual):
        output = make(folder)
        with contextlib.suppress(ValueError, Held):
            there = _taken(output, record)
            if there is None or not there["finished"]:
                return output, there
            release(output.folder)
    raise AssertionError("there is always another number")


def _taken(output: Output, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of what is in an output, whose lock this process takes where that is its job."""
    if not output.folder.is_dir():
        try:
            output.check(output.record(), record)  # before a folder is made for the lock
        except FileNotFoundError:  # another process has just finished it
            pass
        except ValueError:
            if not output.folder.is_dir():  # otherwise another process has just begun it
                raise
    hold(output.folder, f"--out {output.path}")
    try:
        there = output.record()
        output.check(there, record)
    except ValueError:
        release(output.folder)
        raise
    return there


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
