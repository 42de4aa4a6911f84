"""torch.compile of the one-step function."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .eager import Eager
from .run import OneStep, Run, State

__all__ = ["Compiled"]


class Compiled(Eager):
    """One compilation for each signature of a run, without graph breaks and for fixed shapes; should another become necessary
    later, that is an error and not a silent pause. Compiled code is kept on disk, in the user's cache folder unless
    TORCHINDUCTOR_CACHE_DIR names another, so that the next process starts sooner."""

    one_size = True

    def __init__(self, one_step: OneStep) -> None:
        super().__init__(one_step)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "ddim_fast" / "inductor"))
        self._compiled: dict[tuple, Callable[[State, Run, Tensor], tuple[State, Tensor]]] = {}

    def trajectory(self, run: Run) -> Iterator[tuple[State, Tensor]]:
        state = self.one_step.update.start(run.x)
        for index in run.steps.unbind():
            state, output = self.step(state, run, index)
            yield state, output

    def step(self, state: State, run: Run, index: Tensor) -> tuple[State, Tensor]:
        """The one-step function, compiled for runs such as this one."""
        first = run.signature not in self._compiled
        if first:
            self._compiled[run.signature] = self._compile(run)
        with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
            return self._compiled[run.signature](state, run, index)

    def _compile(self, run: Run) -> Callable[[State, Run, Tensor], tuple[State, Tensor]]:
        one_step = self.one_step

        def sampling_step(state: State, run: Run, index: Tensor) -> tuple[State, Tensor]:
            return one_step(state, run, index)

        # torch.compile keeps what it compiled with a function's code, and gives up after a few times. Code of its own for each
        # signature, then, so that samplers and batch sizes do not count as recompilations of each other.
        own = types.FunctionType(sampling_step.__code__.replace(), sampling_step.__globals__, closure=sampling_step.__closure__)
        mode = "max-autotune-no-cudagraphs" if run.x.is_cuda else None
        return torch.compile(own, fullgraph=True, dynamic=False, mode=mode)
