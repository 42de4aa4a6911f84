"""Measurements in parts, by one process or several, and their rows."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..io.locks import hold
from ..io.processes import Processes
from ..io.progress import Bar
from .results import Results
from .shards import Shards, make_shards

__all__ = ["EvaluationRun"]


@dataclass(frozen=True)
class EvaluationRun:
    """The context that all measurements share.

    Attributes:
        processes: the processes that share the work.
        device: their device.
        results: the results that get the rows.
        run: the description of this run in its rows.
        batch_size: images per network call.
        quiet: print results only, no progress.
    """

    processes: Processes
    device: torch.device
    results: Results
    run: dict[str, Any]
    batch_size: int
    quiet: bool

    def has(self, kind: str, settings: dict[str, Any]) -> bool:
        """Whether the results have such a row already."""
        return self.processes.from_first(lambda: self.results.find(kind, settings) is not None)

    def rows(
        self, kind: str, settings: dict[str, Any], count: int, width: int, compute: Callable[[range], Tensor], runs: int = 1
    ) -> Shards:
        """``compute`` for ``count`` images, in parts that are kept in the output's folder until their row is written. ``runs``
        is as of :class:`ddim_fast.io.progress.Bar`."""
        name = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode()).hexdigest()[:16]
        parts = Shards(self.results.folder / f".parts-{name}", count, width, size=-(-128 // self.batch_size) * self.batch_size)
        self.processes.from_first(lambda: hold(parts.folder, f"--out {self.results.folder}"))
        there = count - sum(len(parts.pictures(k)) for k in self.processes.from_first(parts.missing))
        with self.progress(kind, count, there, runs=runs) as bar:
            make_shards(parts, compute, self.processes, bar)
        return parts

    def progress(self, text: str, total: int, there: int = 0, runs: int = 1) -> _Bar:
        """A bar that counts the work of all processes."""
        return _Bar(self.processes, total, there=there, runs=runs, shown=not self.is_silent, text=text)

    @property
    def is_silent(self) -> bool:
        """Whether this process shows no progress: with ``quiet``, or if it is not the first process."""
        return self.quiet or not self.processes.is_first

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        if not self.is_silent:
            print(text, file=sys.stderr, flush=True)

    def record(self, kind: str, settings: dict[str, Any], parts: Shards, find: Callable[[], dict[str, Any]]) -> None:
        """Write the row that the first process makes from the numbers of all, and print it."""

        def write() -> None:
            found = find()
            self.results.add(kind, settings, found, self.run)
            parts.remove()
            words = [f"{name} {value}" for name, value in settings.items() if value is not None and name not in _SILENT]
            numbers = [f"{name} {value:.5g}" for name, value in found.items() if isinstance(value, float)]
            missing = f"; not measured: {found['not measured']}" if "not measured" in found else ""
            print(f"{kind}: {', '.join(words)}: {', '.join(numbers)}{missing}", flush=True)

        self.processes.from_first(write)


# Settings that are the same in all rows of a command.
_SILENT = (
    "model",
    "weights",
    "guide weights",
    "reference",
    "reference content",
    "features",
    "data",
    "content",
    "data content",
    "seeds",
    "class",
    "timesteps",
    "engine",
)


class _Bar(Bar):
    """A bar for the work of several processes, called with this one's new work."""

    def __init__(self, processes: Processes, total: int, **options: Any) -> None:
        super().__init__(total, **options)
        self._processes, self._before = processes, processes.add_done(0) - options["there"]

    def __call__(self, amount: int) -> None:
        self.made(self._processes.add_done(amount) - self._before)
