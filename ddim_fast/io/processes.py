"""The processes of one run: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import io
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

# In what torch's backends say when a connection breaks.
_LOST = ("gloo/", "nccl", "connection closed by peer", "connection reset by peer")


def cpu_threads() -> int:
    """The number of threads outside of torch: OMP_NUM_THREADS, as in torch, or the number of cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the first number of a list is for the outermost level
    return min(_cores(), int(asked)) if asked.isdecimal() and int(asked) else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _attempt() -> str:
    """The number of the attempt that torchrun has begun after failures: its store has the addresses of those before, too. The
    torchruns of several machines count for themselves."""
    is_one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else "0"


class Processes:
    """A context in which processes share work. Their number is in the environment of torchrun; without it there is one. Of
    several that fail, the first one says why, and the others end silently.

    Args:
        alone: this process by itself, whatever the environment says.

    Attributes:
        count: the number of processes.
        rank: the number of this one, from 0.
        local_rank: its number on this machine.
    """

    def __init__(self, alone: bool = False) -> None:
        self.count = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0)) if self.count > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if self.count > 1 else 0
        self._done = 0
        self._on_gpus: Any = None

    def __enter__(self) -> Processes:
        if self.count > 1:
            import torch.distributed  # a single process does not need torch

            dist: Any = torch.distributed  # mypy does not see all of its names
            self._dist = dist
            store, rank, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
            store = dist.PrefixStore(_attempt(), store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
            self._store = dist.PrefixStore("ddim_fast", store)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.count == 1:
            return
        # torchrun sends SIGTERM to those that are left, and why they end is to be said nevertheless.
        with contextlib.nullcontext() if error is None else signals.finishing("error"):
            is_told = isinstance(error, Exception) and not self._is_first_to_fail()
            self._dist.destroy_process_group()
            if is_told:
                sys.exit(1)
            if self.is_lost(error):
                raise RuntimeError("another process of this run has ended") from error

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

    def group(self, device: str) -> Any:
        """The processes as a group of torch's for tensors on a ``device``, cpu or cuda. All of them call this the first time
        together; there are more than one."""
        if device != "cuda":
            return self._dist.group.WORLD
        if self._on_gpus is None:  # gloo, by which the processes talk, is slow on GPUs
            self._on_gpus = self._dist.new_group(backend="nccl")
        return self._on_gpus

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

    def after_first(self, make: Callable[[], T]) -> T:
        """The result of ``make`` in each process: in the first one, then in the others, whose stderr is shown only where it
        raises. If it raises in the first one, they exit silently."""
        made: list[T] = []
        self.from_first(lambda: made.append(make()))
        if not self.is_first:
            said = io.StringIO()
            try:
                with contextlib.redirect_stderr(said):
                    made.append(make())
            except BaseException:
                self._is_first_to_fail()  # said here
                sys.stderr.write(said.getvalue())
                raise
        self.wait()
        return made[0]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each number over all processes, which wait for one another."""
        return self._combined(values, "MAX")

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all processes, in float64; they wait for one another."""
        return self._combined([float(value) for value in values], "SUM")

    def _combined(self, values: Sequence[T], operation: str) -> list[T]:
        if self.count == 1:
            return list(values)
        import torch

        dtype = torch.float64 if isinstance(values[0], float) else torch.int64
        tensor = torch.tensor(values, dtype=dtype)
        self._dist.all_reduce(tensor, getattr(self._dist.ReduceOp, operation))
        return tensor.tolist()

    def is_lost(self, error: BaseException | None) -> bool:
        """Whether an error says that another process has ended."""
        return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _LOST)

    def _is_first_to_fail(self) -> bool:
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # torchrun itself has ended
            return True

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
