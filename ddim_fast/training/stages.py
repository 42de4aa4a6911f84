"""Stages: what is kept of a run to go on from it elsewhere, much smaller than the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..io.files import atomic_folder, write_json
from ..models.checkpoint import AUTOENCODER, load_audio, load_config, save_checkpoint
from ..models.config import UNetConfig
from ..models.weights import read_pickle
from .checkpoints import save_consistency
from .options import TRAINING_STATE

__all__ = ["AVERAGED", "RAW", "write_stage"]

# The subfolders, each a checkpoint: the weights to sample with, and the weights that training goes on with.
AVERAGED, RAW = "averaged", "raw"


def write_stage(run: Path, stage: Path, dtype: torch.dtype, max_shard_size: int | str | None = None) -> None:
    """Write the newest checkpoint of ``run`` as a stage: a checkpoint of the averaged weights, one of the raw weights, and
    stage.json with the number of steps, of images, and the options. The optimiser's state is left out, which is twice as large
    as the weights; a run that goes on (``ddim_fast.train --init STAGE/raw``) starts it anew, in its warm-up.

    Args:
        stage: a new or empty folder.
        dtype: of the stored weights.
        max_shard_size: see :func:`ddim_fast.models.checkpoint.save_checkpoint`.

    Raises:
        FileNotFoundError: ``run`` has no training state: it is no folder of a run.
        FileExistsError: ``stage`` exists and is not an empty folder.
        ValueError: the training state is damaged.
    """
    path = run / TRAINING_STATE
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no {TRAINING_STATE}: only the folder of a run of ddim_fast.train has raw weights")
    config: UNetConfig = load_config(run)
    state = read_pickle(path)
    audio = load_audio(run, config)
    try:
        weights = {AVERAGED: state["ema"], RAW: state["model"]}
        options = state["options"]
        record = {"step": state["step"], "images": state["step"] * options["batch_size"], "options": options}
        stored = {name: {key: t.to(dtype) for key, t in tensors.items()} for name, tensors in weights.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a whole training state") from error
    with atomic_folder(stage) as new:
        for name, tensors in stored.items():
            save_checkpoint(new / name, config, tensors, audio, max_shard_size)
            save_consistency(new / name, options)
            if (run / AUTOENCODER).is_dir():
                shutil.copytree(run / AUTOENCODER, new / name / AUTOENCODER)
        write_json(new / "stage.json", record)
