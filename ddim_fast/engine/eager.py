"""The plain execution, which needs no warm-up."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .run import Deep, OneStep, Outcome, Run, State

__all__ = ["Eager"]


class Eager:
    """Runs the steps one after the other. The other engines differ in what they prepare once.

    Attributes:
        one_size: whether every batch size costs a preparation, so that a smaller last batch had better be filled up.
    """

    one_size = False

    def __init__(self, one_step: OneStep) -> None:
        self.one_step = one_step

    def trajectory(self, run: Run) -> Iterator[tuple[State, Tensor]]:
        """The state after each step, and the network's output in it."""
        state, deep = self.one_step.update.start(run.x), None
        for number, index in enumerate(run.steps.unbind()):
            if number % self.one_step.reuse:
                state, output, _ = self.step(state, run.at(number), index, deep)
            else:
                state, output, features = self.step(state, run.at(number), index, None)
                deep = self.one_step.renewed(deep, features)
            yield state, output

    def step(self, state: State, run: Run, index: Tensor, deep: Deep | None) -> Outcome:
        """The one-step function, as this engine executes it."""
        return self.one_step(state, run, index, deep)

    def last(self, run: Run) -> Tensor:
        """The sample after the last step."""
        x = run.x
        for state, _ in self.trajectory(run):
            x = state[0]
        return x
