"""Settings of commands whose work lies in modules that import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """The settings of train; those of a run that goes on, where options do not give them again."""

    data: str
    convert: bool
    preset: str
    init: str | None
    latents: str | None
    set: list[str]
    recipe: str
    class_conditional: bool
    out: Path
    resume: bool
    steps: int
    batch_size: int
    lr: float
    warmup: int
    lr_schedule: str
    ema: float
    ema_snapshots: int | None
    grad_clip: float
    dropout: float | None
    prediction_type: str | None
    min_snr_gamma: float | None
    label_dropout: float
    flip: bool | None
    dtype: str
    compile: bool
    device: str
    seed: int
    log_every: int
    save_every: int
    sample_every: int
    minutes: float | None
    quiet: bool
