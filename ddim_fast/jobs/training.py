"""A training run that can be resumed: losses, checkpoints, snapshots and pictures in its folder."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..io.progress import duration, redrawn
from ..io.records import SAMPLES
from ..io.stopping import signals
from ..models.checkpoint import SNAPSHOTS
from ..training.averages import snapshots
from ..training.checkpoints import keep_best, prune, set_aside
from ..training.loop import Trainer, TrainingStep
from .background import Background
from .training_log import TrainingLog

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
    validation: str = "",
) -> int | None:
    """Run the loop: progress bar, estimate of the whole time, stats.jsonl, checkpoints, sample grids.

    Args:
        out: the folder of the run.
        save_grid: writes a picture of the network's present samples to a path.
        log_every, save_every, sample_every: steps between lines of stats.jsonl, between checkpoints, and between grids.
        keep: the number of checkpoints that stay, see :mod:`ddim_fast.training.checkpoints`.
        minutes: stop after this time.
        quiet: no progress bar and no estimate.
        validation: the name of the trainer's held-out images; the checkpoint with the lowest loss on them is kept as ``best``.

    Of several processes the first one writes and prints; all stop after the same step. A checkpoint is copied between two
    steps and written in the background; an error of that is raised after the next step, and at the end of the run at the
    latest.

    Returns:
        The signal that ended the run, in any of the processes, or None; its last step is then in a checkpoint, too, but has no
        grid.

    Raises:
        ValueError: the loss or the gradient became infinite or NaN in more steps than ``skip_bad_steps``.
    """
    options, processes = trainer.options, trainer.processes
    quiet = quiet or not processes.is_first
    log = None
    if processes.is_first:
        log = TrainingLog(trainer, out)
        for steps, snapshot in snapshots(out / SNAPSHOTS).items():
            if steps > trainer.step:  # they are about to be made again
                snapshot.unlink()
        prune(out, keep - 1)
    saved, since = trainer.step, time.perf_counter()
    deadline = since + 60 * (minutes or math.inf)

    def stopping() -> tuple[int | None, bool]:
        """The signal that came to any of the processes, or None, and whether the time is over in any."""
        number, is_late = processes.largest([signals.came or 0, time.perf_counter() > deadline])
        return number or None, bool(is_late)

    def save(val_loss: float | None = None) -> None:
        writer.finish()  # before the copy, so that there is never a second one in memory
        writer.start(_saving(trainer, out, saved, keep, val_loss, validation))

    def grid() -> Path:
        return out / SAMPLES / f"{trainer.step:07d}.png"

    def draw() -> None:
        bar.set_description("sampling a grid")
        with redrawn(bar):
            signals.abandon(functools.partial(save_grid, grid()))

    with (
        signals.finishing("step"),
        Background() as writer,
        tqdm(total=options.steps, initial=trainer.step, unit="step", disable=quiet, file=sys.stderr) as bar,
    ):
        estimate = None if quiet else _Estimate(options.steps, bar)
        bar.set_description("compiling" if options.compile else "first step")
        came: int | None = None
        if trainer.step and (trainer.step % sample_every == 0 or trainer.step == options.steps):
            if processes.is_first and not grid().exists():  # the run was stopped while it drew it
                draw()
            came, _ = stopping()
        for step in () if came else trainer.run():  # after a step more, that grid could not be made
            writer.check()
            if log is not None:
                log.add(step)
            bar.set_description("training", refresh=False)
            bar.update()
            if estimate is not None:
                estimate.update(step)
            came, is_late = stopping()
            last = step.step == options.steps or is_late or came
            is_saved, is_shown = last or step.step % save_every == 0, last or step.step % sample_every == 0
            is_logged = is_saved or step.step % log_every == 0
            line = log.read(step, saved) if log is not None and is_logged else {}
            if trainer.held_out is not None and is_saved and not came:
                line["val_loss"] = trainer.validation_loss()
            if log is not None and is_logged:
                log.write(line)
                loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
                bar.set_postfix_str(f"loss {loss}, {line['images_per_s']:.0f} img/s")
            if processes.is_first:
                if options.ema_snapshots is not None and (last or step.step % options.ema_snapshots == 0):
                    trainer.write_snapshot(out / SNAPSHOTS)
                if is_saved:
                    save(line.get("val_loss"))
                if is_shown and not came:
                    draw()
            if is_saved:
                saved = step.step
            if last:
                writer.finish()
            if (is_saved or is_shown) and not came:
                came, _ = stopping()  # a signal meanwhile; the others wait here for the first process
            if came and saved < step.step and processes.is_first:
                save()
            if last or came:
                break
    return came


def _saving(
    trainer: Trainer[Any], out: Path, before: int, keep: int, val_loss: float | None, validation: str
) -> Callable[[], None]:
    """A function that writes the trainer's present checkpoint. It keeps those before it, the last of which is of step
    ``before``, or 0 where there is none, and the best one."""
    checkpoint = trainer.checkpoint()

    def write() -> None:
        if before and keep > 1:
            set_aside(out, before)
        checkpoint.write(out)
        prune(out, keep - 1)
        if val_loss is not None:
            keep_best(out, checkpoint.state["step"], val_loss, validation)

    return write


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
