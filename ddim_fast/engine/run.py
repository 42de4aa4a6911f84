"""A sampling run, and the one step of which it is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..ops.scalars import is_whole
from .network import Conditions, Network, labelled

__all__ = ["Deep", "OneStep", "Outcome", "Run", "State", "Update"]

State = tuple[Tensor, ...]

# The network's deep features in the last step that computed them, and how they changed since the one before that.
Deep = tuple[Tensor, Tensor]

# Of a step: the state after it, the network's output in it, and its deep features if others use them.
Outcome = tuple[State, Tensor, Tensor | None]


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
        guidance: () float32, the scale of guidance, or None.
        guide_conditions: what the guide makes of timesteps and labels; empty without one, and in steps that are not guided.
        correction: (x, output, index) -> output, what is made of the network's output before the solver sees it; a function of
            anybody's, which is not compiled. None for nothing.
        unguided: the numbers of the steps that guidance leaves out.
    """

    x: Tensor
    conditions: Conditions
    table: Tensor
    steps: Tensor
    seeds: Tensor | None
    guidance: Tensor | None
    guide_conditions: Conditions = ()
    correction: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    unguided: frozenset[int] = frozenset()

    @property
    def tensors(self) -> list[Tensor | None]:
        """Everything, in a fixed order."""
        return [self.x, self.table, self.steps, self.seeds, self.guidance, *self.conditions, *self.guide_conditions]

    def like(self, tensors: list[Tensor | None]) -> Run:
        """The same with other tensors, in the order of :attr:`tensors`."""
        x, table, steps, seeds, guidance, *conditions = tensors
        own, guide = tuple(conditions[: len(self.conditions)]), tuple(conditions[len(self.conditions) :])
        return replace(
            self, x=x, table=table, steps=steps, seeds=seeds, guidance=guidance, conditions=own, guide_conditions=guide
        )

    @property
    def signature(self) -> tuple:
        """What one compilation or capture is good for: the shapes and strides, and what there is."""
        return tuple(None if t is None else (tuple(t.shape), t.stride()) for t in self.tensors)

    def at(self, number: int) -> Run:
        """The run as step ``number`` sees it."""
        return self._unguided if number in self.unguided else self

    @functools.cached_property
    def _unguided(self) -> Run:
        conditions = self.conditions if self.guide_conditions else labelled(self.conditions)
        return replace(self, conditions=conditions, guidance=None, guide_conditions=())


class OneStep:
    """From one timestep to the next: the network, guidance, and the solver's update.

    Args:
        reuse: every how many steps the network computes its deep features; 1 is every step. In the steps between they are
            extrapolated linearly in the step's number (as by Liu et al. 2025, arXiv 2503.06923, of first order). Features that
            merely stay as they are lag behind: with them, the packaged fashion-mnist did worse than by fewer steps in the same
            time.
        guide: the network that guidance leads away from; None for the same one without its label.

    Raises:
        ValueError: ``reuse`` is not a whole number from 1, or the network has no features to share.
    """

    def __init__(self, network: Network, update: Update, reuse: int = 1, guide: Network | None = None) -> None:
        if not is_whole(reuse) or reuse < 1:
            raise ValueError(f"reuse must be a whole number of steps, 1 or more; got {reuse!r}")
        if reuse > 1 and not network.can_reuse:
            raise ValueError(
                f"reuse={reuse} needs a network with the methods condition and denoise_reusing, as ddim_fast.UNet has them; "
                "this one can only be sampled with reuse=1"
            )
        self.network = network
        self.update = update
        self.reuse = reuse
        self.guide = guide

    def __call__(self, state: State, run: Run, index: Tensor, deep: Deep | None = None) -> Outcome:
        """One step.

        Args:
            state: the state before it.
            run: what is sampled from.
            index: () int64, the number of the step.
            deep: what there is of deep features, as :meth:`renewed` made it; None computes them.
        """
        return self.finish(state, *self.predict(state[0], run, index, deep), run, index)

    def predict(self, x: Tensor, run: Run, index: Tensor, deep: Deep | None) -> tuple[Tensor, Tensor | None]:
        """The network's part of a step: its output at ``x``, guided, and its deep features if others use them."""
        both = run.guidance is not None and self.guide is None
        at = torch.cat([x, x]) if both else x
        if self.reuse == 1:
            output = self.network(at, run.conditions, index)
            features = None
        else:
            extrapolated = None if deep is None else self._extrapolated(deep, index)
            output, features = self.network.reusing(at, run.conditions, index, extrapolated)
        if both:
            # Ho and Salimans 2022, eq. 6: none + w (label - none), from one network call on both halves.
            unconditional, conditional = output.chunk(2)
            output = torch.lerp(unconditional, conditional, run.guidance)
        elif run.guidance is not None:
            # Karras et al. 2024: guide + w (network - guide), of any prediction that is linear in x_0.
            output = torch.lerp(self.guide(x, run.guide_conditions, index), output, run.guidance)
        return output, features

    def finish(self, state: State, output: Tensor, features: Tensor | None, run: Run, index: Tensor) -> Outcome:
        """What is left of a step when the network has been evaluated."""
        if run.correction is not None:
            output = run.correction(state[0], output, index)
        return self.update.step(state, output, run.table, index, run.seeds), output, features

    def renewed(self, deep: Deep | None, features: Tensor | None) -> Deep | None:
        """What is kept of the deep features that a step computed: of their change nothing is known at first."""
        if features is None:
            return None
        return features, torch.zeros_like(features) if deep is None else features - deep[0]

    def _extrapolated(self, deep: Deep, index: Tensor) -> Tensor:
        features, change = deep
        return torch.addcmul(features, change, (index % self.reuse / self.reuse).to(change.dtype))
