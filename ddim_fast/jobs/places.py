"""The place of a command's output, which holds nothing else."""

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
    """A folder of sounds for a model of sounds, otherwise an .npz file or a folder of pictures.

    Raises:
        ValueError: the place does not fit the images.
    """
    if audio is not None:
        from .sound_outputs import WavFolder

        return WavFolder(path, batches, audio)
    if path.suffix.lower() == ".npz":
        return NpzFile(path, batches)
    check_channels(batches.image_shape[2], "name --out FILE.npz, which holds any channels")
    return PngFolder(path, batches)


def place_output(
    given: Path | None, usual: str, make: Callable[[Path], Kind], record: dict[str, Any]
) -> tuple[Kind, dict[str, Any] | None]:
    """The output of a job, locked for this process, and its existing record.

    Args:
        given: --out; None is the first of the folders ``usual``, ``usual``-2 and so on that is empty or holds this job
            unfinished, and that no other process has locked.
        make: the output at a path.
        record: the record of the job.

    Raises:
        ValueError: ``given`` holds other files, or a record is damaged; the message names the remedy.
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
    """The existing record of an output. This process takes its lock if the output is this job's."""
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
    """The folder for a command's output: ``given``, or the first of ``usual``, ``usual``-2 ... that is new or empty and that no
    other process has locked. This process takes its lock, which lies beside it: so the folder comes to its place whole.

    Raises:
        ValueError: ``given`` is not empty.
        ddim_fast.io.locks.Held: another process is about to fill it.
    """
    for folder in _numbered(usual) if given is None else (given,):
        if given is None and folder.is_dir() and any(folder.iterdir()):
            continue
        with contextlib.nullcontext() if given is not None else contextlib.suppress(ValueError, Held):
            require_empty(folder)
            whole = folder.resolve()
            lock = whole.with_name(f".{whole.name}.lock")
            hold(lock, f"--out {folder}")
            try:
                require_empty(folder)  # another process may have filled it meanwhile
            except ValueError:
                release(lock)
                raise
            return folder
    raise AssertionError("there is always another number")


def _numbered(usual: str) -> Iterator[Path]:
    return (Path(usual if number == 1 else f"{usual}-{number}") for number in itertools.count(1))
