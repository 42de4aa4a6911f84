"""The last checkpoints of a run: the newest in its folder, those before it in ``checkpoints/STEP`` there.

A training state is a zip archive, which has a checksum of each of its files; so damage is found before a run goes on from it.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..io.files import atomic_folder, atomic_write, read_json, remove_remains, write_json
from ..io.records import SAMPLES
from ..models.audio import AudioConfig
from ..models.checkpoint import AUDIO, AUTOENCODER, SNAPSHOTS, WEIGHTS, save_checkpoint, save_timesteps, timesteps_file
from ..models.config import AutoencoderConfig, UNetConfig
from ..models.weights import read_pickle
from .options import CHECKPOINTS, TRAINING_STATE

__all__ = ["TrainingCheckpoint", "keep_best", "kept", "prune", "recover", "remove_run_remains", "save_consistency", "set_aside"]

# In the order in which they are put back: a run that is killed meanwhile still finds the state damaged, and begins again.
_FILES = ("config.json", AUDIO, f"{WEIGHTS}.safetensors", TRAINING_STATE)

# The folder, in that of a run, of the checkpoint with the lowest validation loss; its successor until that is whole; and the
# record in it.
_BEST, _NEXT_BEST, _VALIDATION = "best", "best.next", "validation.json"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A run at one of its steps: what training_state.pt holds, tensors on the CPU, and the network's description."""

    state: dict[str, Any]
    config: UNetConfig | AutoencoderConfig
    audio: AudioConfig | None

    def write(self, folder: Path) -> None:
        """Write ``folder``: the averaged weights as a checkpoint to sample from, and training_state.pt to go on from."""
        buffer = io.BytesIO()
        torch.save(self.state, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        # First: of a process that is killed between the two, Trainer.mend makes the second.
        atomic_write(folder / TRAINING_STATE, buffer.getbuffer())
        save_checkpoint(folder, self.config, self.state["ema"], self.audio)
        save_consistency(folder, self.state["options"])


def save_consistency(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the timesteps of a model of consistency beside its weights in ``folder``, where spacing ``adaptive`` finds them:
    all of them for as many steps, and the first ones for fewer. Nothing for another model.

    Args:
        options: of its training, :class:`ddim_fast.training.options.TrainingOptions` as a dictionary.
    """
    timesteps = options.get("consistency")
    if isinstance(timesteps, (list, tuple)):  # it was True or False in an earlier version
        runs = {count: list(timesteps[:count]) for count in range(1, len(timesteps) + 1)}
        save_timesteps(folder, {"consistency": runs}, {"trained": "consistency"})


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
                _link(out / name, new / name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def keep_best(out: Path, step: int, loss: float, data: str) -> None:
    """Keep the checkpoint in ``out``, which is of ``step``, as ``best``, a model to sample from, where its validation loss is
    lower than that of the one there, or that one's was on other data."""
    _finish_best(out)
    best = out / _BEST
    before = read_json(best / _VALIDATION) if (best / _VALIDATION).is_file() else {}
    if before.get("data") == data and not loss < before.get("val_loss", math.inf):
        return
    with atomic_folder(out / _NEXT_BEST) as new:
        for name in _FILES:
            if name != TRAINING_STATE and (out / name).is_file():
                _link(out / name, new / name)
        if timesteps_file(out).is_file():
            _link(timesteps_file(out), timesteps_file(new))
        if (out / AUTOENCODER).is_dir():
            shutil.copytree(out / AUTOENCODER, new / AUTOENCODER, copy_function=_link)
        write_json(new / _VALIDATION, {"step": step, "val_loss": loss, "data": data})
    _finish_best(out)


def _finish_best(out: Path) -> None:
    """Put a whole new best checkpoint into the place of the former."""
    if (out / _NEXT_BEST).is_dir():
        shutil.rmtree(out / _BEST, ignore_errors=True)
        os.replace(out / _NEXT_BEST, out / _BEST)


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
        remove_remains(folder, lambda name: name.endswith(endings) or name.isdecimal() or name == _NEXT_BEST)
    _finish_best(out)


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
