"""Settings of commands whose work is done in modules that import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NUM_IMAGES", "NUM_TRAJECTORIES", "SAMPLES_FOLDER", "EvaluateSettings", "SampleSettings", "TrainSettings"]

# The default folder of samples.
SAMPLES_FOLDER = "samples"

# FID's usual number of images, and enough of them for a mean over trajectories.
NUM_IMAGES, NUM_TRAJECTORIES = 50_000, 64


@dataclass(frozen=True)
class EvaluateSettings:
    """The settings of evaluate, from its options."""

    reference: str | None
    trajectory_error: bool
    reconstruction: bool
    loss: bool
    fit_timesteps: bool
    fit_solver: list[int] | None
    fetch_inception: bool
    model: str
    images: str | None
    num_images: int | None
    seed: int
    data: str | None
    steps: list[int]
    solver: list[str]
    spacing: list[str]
    eta: list[float | str]
    teacher_steps: int
    tolerance: list[float]
    classes: str
    guidance: float | list[float] | None
    guidance_interval: list[int] | None
    guide: str | None
    compile: bool
    engine: str
    batch_size: int
    device: str
    dtype: str
    inception: tuple[str | None, Path] | None
    out: Path
    quiet: bool


@dataclass(frozen=True)
class SampleSettings:
    """The settings of sample, from its options. Without --steps they are the export's, or the default."""

    model: str
    steps: int
    eta: float | str
    spacing: str
    tolerance: float | None
    solver: str
    clip: float | None
    seeds: Sequence[int]
    batch_size: int | None
    classes: str
    guidance: float | list[float] | None
    guidance_interval: list[int] | None
    guide: str | None
    compile: bool
    engine: str
    reuse: int
    device: str
    provider: str | None
    dtype: str
    out: Path | None
    grid: Path | None
    trajectory: Path | None
    profile: bool
    quiet: bool


@dataclass(frozen=True)
class TrainSettings:
    """The settings of train; a resumed run keeps its own where no option replaces them.

    Attributes:
        steps: None until the device is known, where neither names a number.
    """

    data: str
    val: str | None
    convert: bool
    max_bad: int
    preset: str
    init: str | None
    latents: str | None
    set: list[str]
    recipe: str
    class_conditional: bool
    out: Path
    resume: bool
    steps: int | None
    batch_size: int
    optimizer: str
    accumulate: int
    lr: float
    warmup: int
    lr_schedule: str
    ema: float
    ema_snapshots: int | None
    grad_clip: float
    skip_bad_steps: int
    dropout: float | None
    prediction_type: str | None
    min_snr_gamma: float | None
    consistency: list[int] | None
    label_dropout: float
    flip: bool | None
    dtype: str
    compile: bool
    shard: bool
    device: str
    seed: int
    log_every: int
    save_every: int
    sample_every: int
    keep: int
    minutes: float | None
    quiet: bool
