"""A training run that can be resumed: losses, checkpoints, snapshots and pictures in its folder."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..io.files import atomic_write
from ..io.progress import duration, redrawn
from ..io.records import SAMPLES, STATS
from ..io.stopping import signals
from ..models.checkpoint import SNAPSHOTS
from ..training.averages import snapshots
from ..training.checkpoints import prune, set_aside
from ..training.loop import Trainer, TrainingStep

__all__ = ["run_training"]


def run_training(
    trainer: Trainer[Any],
    out: Path,
    save_grid: Callable[[Path], None],
    *,
    log_every: int,
    save_every: int,
    sample_every: int,
    keep: int,
    minutes: float | None = None,
    quiet: bool = False,
) -> int | None:
    """Run the loop: progress bar, estimate of the whole time, stats.jsonl, checkpoints, sample grids.

    Args:
        out: the folder of the run.
        save_grid: writes a picture of the network's present samples to a path.
        log_every, save_every, sample_every: steps between lines of stats.jsonl, between checkpoints, and between grids.
        keep: the number of checkpoints that stay, see :mod:`ddim_fast.training.checkpoints`.
        minutes: stop after this time.
        quiet: no progress bar and no estimate.

    Of several processes the first one writes and prints; all stop after the same step.

    Returns:
        The signal that ended the run, in any of the processes, or None; its last step is then in a checkpoint, too, but has no
        grid.

    Raises:
        ValueError: the loss or the gradient became infinite or NaN.
    """
    options, processes = trainer.options, trainer.processes
    quiet = quiet or not processes.is_first
    if processes.is_first:
        _forget_after(out, trainer.step)
        prune(out, keep - 1)
    total = torch.zeros((), device=trainer.model.device)
    came, logged, saved, since = signals.came, trainer.step, trainer.step, time.perf_counter()
    deadline = since + 60 * (minutes or math.inf)

    def stopping() -> tuple[int | None, bool]:
        """The signal that came to any of the processes, or None, and whether the time is over in any."""
        number, is_late = processes.largest([signals.came or 0, time.perf_counter() > deadline])
        return number or None, bool(is_late)

    with (
        signals.finishing("step"),
        open(out / STATS if processes.is_first else os.devnull, "a", encoding="utf-8") as stats,
        tqdm(total=options.steps, initial=trainer.step, unit="step", disable=quiet, file=sys.stderr) as bar,
    ):
        estimate = None if quiet else _Estimate(options.steps, bar)
        bar.set_description("compiling" if options.compile else "first step")
        for step in trainer.run():
            total += step.loss
            bar.set_description("training", refresh=False)
            bar.update()
            if estimate is not None:
                estimate.update(step)
            came, is_late = stopping()
            last = step.step == options.steps or is_late or came
            if last or step.step % log_every == 0 or step.step % save_every == 0:
                loss, grad_norm = total.item() / (step.step - logged), step.grad_norm.item()
                # The last gradient is already in the weights, but not yet in a loss.
                for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
                    if not math.isfinite(value):
                        kept = f"{out} keeps the checkpoint of step {saved}" if saved else "there is no checkpoint yet"
                        raise ValueError(
                            f"the {what} became {value} by step {step.step}; lower --lr, or use --dtype float32 ({kept})"
                        )
                now = time.perf_counter()
                rate = (step.step - logged) * options.batch_size / (now - since)
                line = {
                    "step": step.step,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "lr": step.lr,
                    "images_per_s": rate,
                    "time": time.time(),
                }
                stats.write(json.dumps(line) + "\n")
                stats.flush()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s")
                total.zero_()
                logged, since = step.step, now
            is_saved, is_shown = last or step.step % save_every == 0, last or step.step % sample_every == 0
            if processes.is_first:
                if options.ema_snapshots is not None and (last or step.step % options.ema_snapshots == 0):
                    trainer.write_snapshot(out / SNAPSHOTS)
                if is_saved:
                    _save(trainer, out, saved, keep)
                if is_shown and not came:
                    bar.set_description("sampling a grid")
                    with redrawn(bar):
                        signals.abandon(functools.partial(save_grid, out / SAMPLES / f"{step.step:07d}.png"))
            if is_saved:
                saved = step.step
            if (is_saved or is_shown) and not came:
                came, _ = stopping()  # a signal meanwhile; the others wait here for the first process
            if came and saved < step.step and processes.is_first:
                _save(trainer, out, saved, keep)
            if last or came:
                break
    return came


def _save(trainer: Trainer[Any], out: Path, before: int, keep: int) -> None:
    """Write a checkpoint, and keep those before it; the last is of step ``before``, or 0 where there is none."""
    if before and keep > 1:
        set_aside(out, before)
    trainer.save(out)
    prune(out, keep - 1)


class _Estimate:
    """Print once an estimate of the remaining time, from the steps after the first, which compiles and allocates."""

    _STEPS, _SECONDS = 2, 5.0  # the least time to measure

    def __init__(self, steps: int, bar: Any) -> None:
        self._steps, self._bar = steps, bar
        self._first: tuple[int, float] | None = None
        self._said = False

    def update(self, made: TrainingStep) -> None:
        """Count a finished step."""
        if self._said:
            return
        if self._first is None:
            made.loss.item()  # waits for the GPU, as below
            self._first = made.step, time.perf_counter()
        elif made.step - self._first[0] >= self._STEPS and time.perf_counter() - self._first[1] >= self._SECONDS:
            made.loss.item()
            left = self._steps - made.step
            seconds = (time.perf_counter() - self._first[1]) / (made.step - self._first[0]) * left
            self._bar.write(f"about {duration(seconds)} for the remaining {left:,} steps", file=sys.stderr)
            self._said = True


def _forget_after(out: Path, step: int) -> None:
    """Drop the lines and snapshots of steps after the last checkpoint, which are about to be made again, and incomplete
    lines."""
    path, kept = out / STATS, []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line.decode())["step"] <= step:
                kept.append(line + b"\n")
    if path.exists():
        atomic_write(path, b"".join(kept))
    for steps, snapshot in snapshots(out / SNAPSHOTS).items():
        if steps > step:
            snapshot.unlink()
