"""Eager execution, which needs no warm-up."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Eager"]

Result = TypeVar("Result")


class Eager:
    """Calls functions as they are. The other engines differ in what they prepare once.

    Attributes:
        needs_one_batch_size: whether every batch size costs a preparation, so that a smaller last batch is better padded.
        runs_whole: whether :meth:`run` is one call, so that nothing can be called between its steps.
    """

    needs_one_batch_size = False
    runs_whole = False

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)``.

        Args:
            function: a pure function; its identity is part of what is prepared, so it must be the same object in each run.
            arguments: tensors and None, nested in tuples.
        """
        return function(*arguments)

    def run(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> Tensor:
        """``loop(self, inputs, plan)``, a function that executes its steps by :meth:`call`.

        Args:
            loop: as ``function`` of :meth:`call`.
            inputs: tensors and None, nested in tuples.
            plan: whatever else decides which steps the loop takes.
        """
        return loop(self, inputs, plan)
