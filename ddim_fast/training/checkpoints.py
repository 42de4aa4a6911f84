"""The last checkpoints of a run: the newest in its folder, those before it in ``checkpoints/STEP`` there.

A training state is a zip archive, which has a checksum of each of its files; so damage is found before a run goes on from it.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

from ..io.files import atomic_folder, atomic_write, remove_remains
from ..io.records import SAMPLES
from ..models.checkpoint import AUDIO, AUTOENCODER, SNAPSHOTS, WEIGHTS
from ..models.weights import read_pickle
from .options import CHECKPOINTS, TRAINING_STATE

__all__ = ["kept", "prune", "recover", "remove_run_remains", "set_aside"]

# In the order in which they are put back: a run that is killed meanwhile still finds the state damaged, and begins again.
_FILES = ("config.json", AUDIO, f"{WEIGHTS}.safetensors", TRAINING_STATE)


def kept(out: Path) -> dict[int, Path]:
    """The folders of the checkpoints before the newest, by their steps, the last one first."""
    folders = {int(path.name): path for path in (out / CHECKPOINTS).glob("[0-9]*") if path.name.isdecimal()}
    return dict(sorted(folders.items(), reverse=True))


def set_aside(out: Path, step: int) -> None:
    """Keep the checkpoint in ``out``, which is of ``step``, where the next one will not replace it: as further names of its
    files where the file system has these, otherwise as copies."""
    folder = out / CHECKPOINTS / f"{step:07d}"
    if folder.exists():  # of a run that was stopped before it wrote the next one
        return
    with atomic_folder(folder) as new:
        for name in _FILES:
            if (out / name).is_file():
                try:
                    os.link(out / name, new / name)
                except OSError:
                    shutil.copy2(out / name, new / name)


def prune(out: Path, count: int) -> None:
    """Remove all but the last ``count`` of :func:`kept`."""
    for folder in list(kept(out).values())[count:]:
        shutil.rmtree(folder, ignore_errors=True)


def recover(out: Path) -> str | None:
    """Put the newest whole checkpoint of a run into its folder, where the one there is damaged.

    Returns:
        What was done, in words for people; None where there was nothing to do.

    Raises:
        ValueError: all are damaged; the message names the newest file.
    """
    if not (out / TRAINING_STATE).is_file() and not kept(out):
        return None
    damaged = []
    for folder in (out, *kept(out).values()):
        problem = _problem(folder / TRAINING_STATE)
        if problem is None:
            break
        damaged.append(problem)
    else:
        raise ValueError(f"{'; '.join(damaged)}; there is no checkpoint before, so begin the run again in another --out")
    if folder == out:
        return None
    for name in _FILES:
        if (folder / name).is_file():
            atomic_write(out / name, (folder / name).read_bytes())  # a copy: what damages one file spares the other
    for later in kept(out).values():
        if int(later.name) > int(folder.name):
            shutil.rmtree(later)
    return f"{'; '.join(damaged)}: going on from the checkpoint before, of step {int(folder.name)}"


def remove_run_remains(out: Path) -> None:
    """Remove half-written files of processes that were killed; no other one may be writing there."""
    endings = (".json", ".jsonl", ".safetensors", ".pt", ".png")
    for folder in (out, *(out / name for name in (SAMPLES, SNAPSHOTS, AUTOENCODER, CHECKPOINTS))):
        remove_remains(folder, lambda name: name.endswith(endings) or name.isdecimal())


def _problem(state: Path) -> str | None:
    """What is wrong with a training state, as far as it can be told without its network; None where it is whole."""
    if not state.is_file():
        return f"{state} is missing"
    try:
        with zipfile.ZipFile(state) as archive:
            is_whole = archive.testzip() is None
        read_pickle(state)
    except Exception:  # zipfile raises whatever it runs into in a damaged file
        is_whole = False
    return None if is_whole else f"{state}: not a whole training state"
