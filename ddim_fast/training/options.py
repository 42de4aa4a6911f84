"""How to train. Without torch: --help of train shows the defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CHECKPOINTS", "TRAINING_STATE", "TrainingOptions"]

# What a run goes on from, beside its checkpoint.
TRAINING_STATE = "training_state.pt"

# The folder, in that of a run, of its checkpoints before the last.
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train; the defaults are those of the DDPM and DDIM papers.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images a step, in all processes together.
        accumulate: compute the gradient of a batch in so many slices, one after the other, for less memory.
        optimizer: ``adam``, or ``muon``: see :class:`ddim_fast.training.muon.Muon`.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        lr_schedule: after the warm-up, ``constant`` or ``cosine`` (to zero at the last step).
        ema: decay of the averaged weights, which are the ones that are sampled.
        ema_snapshots: keep two more averages, for ``Trainer.write_snapshot`` to be called every so many steps, or None.
        grad_clip: largest norm of the gradient.
        skip_bad_steps: steps whose loss or gradient may be infinite or NaN, in the whole run. Such a step never changes the
            weights; one more ends a run of ``python -m ddim_fast.train``.
        min_snr_gamma: see :class:`ddim_fast.training.loss.DenoisingLoss`; None for the plain loss.
        consistency: train with :class:`ddim_fast.training.loss.ConsistencyLoss`, for sampling at these timesteps alone; None to
            denoise at all of them.
        label_dropout: share of the labels replaced by the null class, for classifier-free guidance.
        flip: mirror half of the images, left to right.
        bf16: run the network under bf16 autocast.
        compile: run the loss through torch.compile.
        shard: split weights, gradients, the optimiser's state and the averages among the processes:
            :class:`ddim_fast.training.distributed.ShardedLoss`.
        seed: of the order of the images, the noise, the dropout and the initial weights.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    steps: int = 800_000
    batch_size: int = 128
    optimizer: str = "adam"
    accumulate: int = 1
    lr: float = 2e-4
    warmup: int = 5000
    lr_schedule: str = "constant"
    ema: float = 0.9999
    ema_snapshots: int | None = None
    grad_clip: float = 1.0
    skip_bad_steps: int = 0
    min_snr_gamma: float | None = None
    consistency: Sequence[int] | None = None
    label_dropout: float = 0.1
    flip: bool = True
    bf16: bool = False
    compile: bool = False
    shard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, holds, right in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("optimizer", self.optimizer in ("adam", "muon"), "adam or muon"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "positive"),
            ("warmup", self.warmup >= 0, "at least 0"),
            ("lr_schedule", self.lr_schedule in ("constant", "cosine"), "constant or cosine"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("ema_snapshots", self.ema_snapshots is None or self.ema_snapshots >= 1, "at least 1"),
            ("grad_clip", self.grad_clip > 0, "positive"),
            ("skip_bad_steps", self.skip_bad_steps >= 0, "at least 0"),
            ("min_snr_gamma", self.min_snr_gamma is None or self.min_snr_gamma > 0, "positive"),
            ("label_dropout", 0 <= self.label_dropout <= 1, "in [0, 1]"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {right}; got {getattr(self, name)!r}")
        if self.consistency is not None:
            if not self.consistency or min(self.consistency) < 0 or list(self.consistency) != sorted({*self.consistency})[::-1]:
                listed = ",".join(map(str, self.consistency))
                raise ValueError(f"consistency must be timesteps, falling, such as 999,400; got {listed!r}")
            if self.min_snr_gamma is not None:
                raise ValueError("min_snr_gamma is for the denoising loss; consistency weighs all its timesteps alike")
        if self.shard and self.optimizer == "muon":
            raise ValueError("shard splits the matrices that optimizer muon needs whole; use optimizer adam, or leave it out")
        if self.shard and self.compile:
            raise ValueError("shard does not go with compile, which needs whole weights; leave one of them out")
        if not self.shard:
            self.slice_size(1)

    def slice_size(self, processes: int) -> int:
        """The images that one of so many processes computes at once.

        Raises:
            ValueError: a batch does not divide into such slices, or there is one process to ``shard`` among.
        """
        if self.shard and processes == 1:
            raise ValueError("shard splits a network among several processes; start them by torchrun --nproc-per-node N")
        slices = processes * self.accumulate
        if self.batch_size % slices:
            why = [f"{processes} processes"] * (processes > 1) + [f"accumulate {self.accumulate}"] * (self.accumulate > 1)
            raise ValueError(f"batch_size must be a multiple of {slices}, for {' and '.join(why)}; got {self.batch_size}")
        return self.batch_size // slices
