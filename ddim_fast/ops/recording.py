"""The operators by their names in a profile. Outside of compiled code their kernels are called directly, not through
torch.library, and torch.profiler does not see them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import record_function

from . import attention, conv3x3, ddim_step, group_norm_silu
from .dispatch import Implementation, choose, server

__all__ = ["recorded_operators"]


@contextlib.contextmanager
def recorded_operators() -> Iterator[dict[str, set[str]]]:
    """A context, for the whole process, in which each call of an operator is a range ``ddim_fast::OPERATOR[IMPLEMENTATION]`` of
    torch.profiler. An engine that has compiled something inside is of no use outside, and the other way round.

    Yields:
        The implementations that have served so far, by operator: names of :data:`ddim_fast.ops.dispatch.BACKENDS`, or
        "PyTorch". What torch.compile fused with its neighbours has none.
    """
    served: dict[str, set[str]] = {}

    @torch.compiler.assume_constant_result  # while compiling it is called as it is, not traced
    def note(operator: str, name: str) -> None:
        served.setdefault(operator, set()).add(name)

    def recorded(operator: str, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            note(operator, name)
            if torch.compiler.is_compiling():
                return run(*arguments, **options)
            with record_function(f"ddim_fast::{operator}[{name}]"):
                return run(*arguments, **options)

        return call

    def choose_recorded(operator: str, implementations: Sequence[Implementation], request: Any) -> Implementation:
        chosen = choose(operator, implementations, request)
        name = server(implementations, chosen)
        if torch.compiler.is_compiling():
            note(operator, name)
            return chosen
        return dataclasses.replace(chosen, run=recorded(operator, name, chosen.run))

    # A convolution's implementation is chosen when its weights are prepared, not when it runs.
    replaced = [(module, "choose", choose_recorded) for module in (attention, ddim_step, group_norm_silu)] + [
        (conv3x3, "_run_native", recorded("conv3x3", "native", conv3x3._run_native)),
        (conv3x3, "_run_pytorch", recorded("conv3x3", "PyTorch", conv3x3._run_pytorch)),
    ]
    with contextlib.ExitStack() as restored:
        for module, name, function in replaced:
            restored.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield served
