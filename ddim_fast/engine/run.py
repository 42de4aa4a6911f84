"""A sampling run, and the one step of which it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .network import Conditions, Network

__all__ = ["OneStep", "Run", "State", "Update"]

State = tuple[Tensor, ...]


class Update(Protocol):
    """What a step does with the network's output: a solver's part of it. The coefficients of all steps are one table."""

    def start(self, x: Tensor) -> State:
        """The state before the first step; its first tensor is the sample, the others are the solver's memory."""
        ...

    def step(self, state: State, output: Tensor, table: Tensor, index: Tensor, seeds: Tensor | None) -> State:
        """The state after step ``index``, a () int64 tensor that stays on its device."""
        ...


@dataclass(frozen=True)
class Run:
    """All that a batch is sampled from, on its device.

    Attributes:
        x: (N, C, H, W) float32, the sample before the first step.
        conditions: what the network makes of timesteps and labels.
        table: (S, ...) float32, the solver's coefficients.
        steps: (S,) int64, 0 to S - 1.
        seeds: (N,) int64 of stochastic sampling, or None.
        guidance: () float32, the scale of classifier-free guidance, or None.
    """

    x: Tensor
    conditions: Conditions
    table: Tensor
    steps: Tensor
    seeds: Tensor | None
    guidance: Tensor | None

    @property
    def tensors(self) -> list[Tensor | None]:
        """Everything, in a fixed order."""
        return [self.x, *self.conditions, self.table, self.steps, self.seeds, self.guidance]

    def like(self, tensors: list[Tensor | None]) -> Run:
        """The same with other tensors, in the order of :attr:`tensors`."""
        x, *conditions, table, steps, seeds, guidance = tensors
        return Run(x, tuple(conditions), table, steps, seeds, guidance)

    @property
    def signature(self) -> tuple:
        """What one compilation or capture is good for: the shapes, and what there is."""
        return tuple(None if t is None else tuple(t.shape) for t in self.tensors)


class OneStep:
    """From one timestep to the next: the network, guidance, and the solver's update."""

    def __init__(self, network: Network, update: Update) -> None:
        self.network = network
        self.update = update

    def __call__(self, state: State, run: Run, index: Tensor) -> tuple[State, Tensor]:
        """The state after step ``index``, and the network's output in it."""
        x = state[0]
        if run.guidance is None:
            output = self.network(x, run.conditions, index)
        else:
            # Ho and Salimans 2022, eq. 6: none + w (label - none), from one network call on both halves.
            unconditional, conditional = self.network(torch.cat([x, x]), run.conditions, index).chunk(2)
            output = torch.lerp(unconditional, conditional, run.guidance)
        return self.update.step(state, output, run.table, index, run.seeds), output
