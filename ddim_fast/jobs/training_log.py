"""What a training run writes of its steps: stats.jsonl, and bad_steps.jsonl for those with a loss or gradient that is not
finite."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import atomic_write
from ..io.records import BAD_STEPS, STATS
from ..training.loop import Trainer, TrainingStep

__all__ = ["TrainingLog"]


class TrainingLog:
    """The records of a run in its folder. Lines of steps after the trainer's are dropped: they are about to be made again.

    Args:
        trainer: at the step from which the run goes on.
        out: the folder of the run.
    """

    def __init__(self, trainer: Trainer[Any], out: Path) -> None:
        self._trainer, self._out = trainer, out
        for name in (STATS, BAD_STEPS):
            _forget_after(out / name, trainer.step)
        bad = out / BAD_STEPS
        self._bad = len(bad.read_bytes().splitlines()) if bad.exists() else 0
        self._seen: list[Tensor] = []
        self._since = time.perf_counter()

    def add(self, step: TrainingStep) -> None:
        """Remember a step; nothing is read from the device."""
        self._seen.append(torch.stack([step.loss, step.grad_norm]))

    def read(self, step: TrainingStep, saved: int) -> dict[str, Any]:
        """The line on the steps since the last one, up to ``step``: their mean loss, the last gradient's norm, and images a
        second; None for a number that is not finite. Waits for the device.

        Args:
            saved: the step of the last checkpoint, or 0.

        Raises:
            ValueError: more steps than ``skip_bad_steps`` had a loss or gradient that is not finite.
        """
        seen = torch.stack(self._seen).tolist()
        self._seen.clear()
        for number, (loss, norm) in enumerate(seen, step.step - len(seen) + 1):
            if not math.isfinite(loss + norm):
                self._note_bad(number, loss, norm, saved)
        losses = [loss for loss, norm in seen if math.isfinite(loss + norm)]
        now, norm = time.perf_counter(), seen[-1][1]
        rate, self._since = len(seen) * self._trainer.options.batch_size / (now - self._since), now
        return {
            "step": step.step,
            "loss": math.fsum(losses) / len(losses) if losses else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": step.lr,
            "images_per_s": rate,
            "time": time.time(),
        }

    def write(self, line: dict[str, Any]) -> None:
        """Add a line to stats.jsonl."""
        _append(self._out / STATS, line)

    def _note_bad(self, step: int, loss: float, norm: float, saved: int) -> None:
        """Write the images of a step that has changed no weights; an error where it is one too many."""
        images = self._trainer.indices(step - 1).tolist()
        values = {name: x if math.isfinite(x) else str(x) for name, x in (("loss", loss), ("grad_norm", norm))}
        _append(self._out / BAD_STEPS, {"step": step, **values, "images": images})
        self._bad += 1
        if self._bad <= self._trainer.options.skip_bad_steps:
            return
        what = f"gradient's norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        kept = f"{self._out} keeps the checkpoint of step {saved}" if saved else "there is no checkpoint yet"
        raise ValueError(
            f"the {what} at step {step} (loss {loss:g}, gradient norm {norm:g}, images in {self._out / BAD_STEPS}); lower "
            f"--lr, use --dtype float32, or allow such steps by --skip-bad-steps ({kept})"
        )


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and incomplete lines."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line.decode())["step"] <= step:
                kept.append(line + b"\n")
    atomic_write(path, b"".join(kept))
