"""Training for as long as it takes: losses, checkpoints, snapshots and pictures in the folder of a run that can go on."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..io.files import atomic_write
from ..io.records import SAMPLES, STATS
from ..models.checkpoint import SNAPSHOTS
from ..training.averages import snapshots
from ..training.loop import Trainer

__all__ = ["run_training"]


def run_training(
    trainer: Trainer[Any],
    out: Path,
    save_grid: Callable[[Path], None],
    *,
    log_every: int,
    save_every: int,
    sample_every: int,
    minutes: float | None = None,
    quiet: bool = False,
) -> bool:
    """Run the loop: progress bar, stats.jsonl, checkpoints, sample grids.

    Args:
        out: the folder of the run.
        save_grid: writes a picture of what the network makes by now to a path.
        log_every, save_every, sample_every: steps between lines of stats.jsonl, between checkpoints, and between grids.
        minutes: stop after so many.
        quiet: no progress bar.

    Returns:
        Whether Ctrl-C ended it; there is a checkpoint of its last step then, too.
    """
    options = trainer.options
    _forget_after(out, trainer.step)
    total = torch.zeros((), device=trainer.model.device)
    logged, saved, since = trainer.step, trainer.step, time.perf_counter()
    deadline = since + 60 * (minutes or math.inf)
    with (
        _interruptible() as interrupted,
        open(out / STATS, "a", encoding="utf-8") as stats,
        tqdm(total=options.steps, initial=trainer.step, unit="step", disable=quiet, file=sys.stderr) as bar,
    ):
        for step in trainer.run():
            total += step.loss
            bar.update()
            last = step.step == options.steps or time.perf_counter() > deadline or interrupted()
            if last or step.step % log_every == 0 or step.step % save_every == 0:
                loss, grad_norm = total.item() / (step.step - logged), step.grad_norm.item()
                # The gradient of the last step is in the weights already, and not in a loss yet.
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
            if options.ema_snapshots is not None and (last or step.step % options.ema_snapshots == 0):
                trainer.write_snapshot(out / SNAPSHOTS)
            if last or step.step % save_every == 0:
                trainer.save(out)
                saved = step.step
            if last or step.step % sample_every == 0:
                save_grid(out / SAMPLES / f"{step.step:07d}.png")
            if last:
                break
    return interrupted()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C does not interrupt the step that is being made, half of whose weights could be new: it is remembered. A
    second one does.

    Yields:
        Whether it came.
    """
    came: list[int] = []

    def remember(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _forget_after(out: Path, step: int) -> None:
    """Drop the lines and the snapshots of steps that are about to be made again, because the run stopped after its last
    checkpoint; and lines that are none, as one that was not written to its end."""
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
