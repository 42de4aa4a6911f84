"""The processes of one run: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from .stopping import signals

__all__ = ["Processes", "cpu_threads"]

T = TypeVar("T")

# Processes wait for the slowest one at the end, but not for a failed one: torchrun ends all, and a lost connection is an error.
_PATIENCE = timedelta(days=7)


def cpu_threads() -> int:
    """The number of threads outside of torch: OMP_NUM_THREADS, as in torch, or the number of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the first number of a list is for the outermost level
    return min(_cores(), int(asked)) if asked.isdecimal() and int(asked) else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes:
    """A context in which processes share work. Their number is in the environment of torchrun; without it there is one.

    Attributes:
        count: the number of processes.
        rank: the number of this one, from 0.
        local_rank: its number on this machine.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.count > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if self.count > 1 else 0
        self._done = 0

    def __enter__(self) -> Processes:
        if self.count > 1:
            import torch.distributed  # a single process does not need torch

            dist: Any = torch.distributed  # mypy does not see all of its names
            self._dist = dist
            store, rank, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
            self._store = dist.PrefixStore("ddim_fast", store)
        return self

    def __exit__(self, *error: object) -> None:
        if self.count > 1:
            self._dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which decides and prints for all."""
        return self.rank == 0

    def device_name(self, name: str) -> str:
        """The device of this process for the user's ``name``: each process has a GPU of its own, unless one is named."""
        if self.count == 1:
            return name
        import torch

        on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local_rank}" if on_gpu else name

    def share_cores(self) -> None:
        """Divide the machine's cores among its processes. torchrun sets OMP_NUM_THREADS to 1 where the user does not set it."""
        if self.count > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            import torch

            torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", self.count))))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of the items."""
        return items[self.rank :: self.count]

    def from_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in the first process. If it raises there, the others exit silently."""
        if self.count == 1:
            return make()
        result: T | None = None
        error: BaseException | None = None
        if self.is_first:
            try:
                result = make()
            except BaseException as raised:
                error = raised
        message: list[Any] = [result, error is not None]
        self._dist.broadcast_object_list(message, src=0)
        if error is not None:
            raise error
        if message[1]:
            sys.exit(1)
        return message[0]

    def add_done(self, amount: int) -> int:
        """Count work done; returns the work of all processes so far."""
        if self.count == 1:
            self._done += amount
            return self._done
        return self._store.add("done", amount)

    def wait(self) -> None:
        """Wait for all processes.

        Raises:
            RuntimeError: one of them has ended.
            ddim_fast.io.stopping.Stopped: a signal has ended it, which came here, too.
        """
        if self.count > 1:
            try:
                self._dist.barrier()
            except RuntimeError:
                signals.check()
                raise
