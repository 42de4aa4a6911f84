"""torch.compile of the step."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend

from .eager import Eager

__all__ = ["Compiled", "signature", "why_not_compiled"]


class Compiled(Eager):
    """One compilation for each function and the shapes of its arguments, without graph breaks; should another become necessary
    later, that is an error and not a silent pause. Threads compile in turns and run compiled code side by side."""

    needs_one_batch_size = True

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._compiling = threading.Lock()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        key = (function, signature(arguments), torch.is_inference_mode_enabled())
        if key not in self._compiled:
            with self._compiling:
                if key not in self._compiled:
                    compiled = _compile(function)
                    result = compiled(*arguments)
                    self._compiled[key] = compiled  # not before the call that compiles it: another thread's would, too
                    return result
        return self._compiled[key](*arguments)


def signature(arguments: Any) -> Hashable:
    """The shapes, strides and dtypes of tensors nested in tuples: a compilation or a capture serves these alone."""
    if isinstance(arguments, Tensor):
        return tuple(arguments.shape), arguments.stride(), arguments.dtype
    return tuple(map(signature, arguments)) if isinstance(arguments, (tuple, list)) else arguments


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    def step(*arguments: Any) -> Any:
        return function(*arguments)

    # torch.compile keeps what it compiled with a function's code, and gives up after a few times. Code of its own for each
    # signature, then, so that samplers and batch sizes do not count as recompilations of each other.
    own = types.FunctionType(step.__code__.replace(), step.__globals__, closure=step.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=_once())


@functools.cache
def why_not_compiled(device: torch.device) -> str | None:
    """Why torch.compile does not work on ``device``, in one line; None where it does. Compiles a sum, once, to find out:
    whether there is a C++ compiler, or Triton, that serves, only torch knows."""
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
        compile_graph: Any = lookup_backend("inductor")
        return compile_graph(graph, inputs, config_patches={"autotune_num_choices_displayed": 0})

    return inductor
