"""torch.compile of the one-step function."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from ..io.files import cache_folder
from .eager import Eager
from .run import Deep, OneStep, Outcome, Run, State

__all__ = ["Compiled", "why_not_compiled"]


class Compiled(Eager):
    """One compilation for each signature of a run, and one for its steps that use deep features again, without graph breaks and
    for fixed shapes; should another become necessary later, that is an error and not a silent pause. Compiled code is kept on
    disk, in the user's cache folder unless TORCHINDUCTOR_CACHE_DIR names another, so that the next process starts sooner.
    Threads compile in turns, and run what is compiled side by side."""

    one_size = True

    def __init__(self, one_step: OneStep) -> None:
        super().__init__(one_step)
        _keep_compiled_code()
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        self._compiling = threading.Lock()

    def step(self, state: State, run: Run, index: Tensor, deep: Deep | None) -> Outcome:
        if run.correction is None:
            return self._call(self.one_step, state, run, index, deep)
        predicted = self._call(self.one_step.predict, state[0], run, index, deep)
        return self.one_step.finish(state, *predicted, run, index)

    def _call(self, function: Callable[..., Any], x: State | Tensor, run: Run, index: Tensor, deep: Deep | None) -> Any:
        key = (run.signature, deep is None, function is self.one_step, torch.is_inference_mode_enabled())
        if key not in self._compiled:
            with self._compiling:
                if key not in self._compiled:
                    compiled = self._compile(function)
                    result = compiled(x, run, index, deep)
                    self._compiled[key] = compiled  # not before the call that compiles it: another thread's would, too
                    return result
        return self._compiled[key](x, run, index, deep)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the one step, to be compiled for what it is first called with."""

        def sampling_step(x: State | Tensor, run: Run, index: Tensor, deep: Deep | None) -> Any:
            return function(x, run, index, deep)

        # torch.compile keeps what it compiled with a function's code, and gives up after a few times. Code of its own for each
        # signature, then, so that samplers and batch sizes do not count as recompilations of each other.
        own = types.FunctionType(sampling_step.__code__.replace(), sampling_step.__globals__, closure=sampling_step.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False, backend=_once())


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why torch.compile does not work on ``device``, in one line; None where it does. Compiles a sum, once, to find out:
    whether there is a C++ compiler, or Triton, that serves, only torch knows."""
    _keep_compiled_code()
    try:
        torch.compile(lambda x: x + 1, fullgraph=True, dynamic=False)(torch.zeros(16, device=device))
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return None


def _once() -> Callable[..., Any]:
    """Inductor, for a single compilation. torch.compiler.set_stance("fail_on_recompile") would forbid a second one to the whole
    process: to other threads, and to functions that are not ours."""
    graphs = 0

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        if graphs > 1:
            raise RuntimeError("the step of this sampler would be recompiled: something of it changed after its first run")
        # Where TORCHINDUCTOR_MAX_AUTOTUNE=1 has it tuned, which takes minutes, no table on the terminal for each operator.
        return lookup_backend("inductor")(graph, inputs, config_patches={"autotune_num_choices_displayed": 0})

    return inductor


def _keep_compiled_code() -> None:
    """Has torch.compile write to the user's cache folder where it would write to a temporary one, which does not last."""
    # torch fills the variable in by itself when it is first asked to compile.
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not chosen or chosen.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
