"""What runs tell of themselves: the state after each step, yielded by ``trajectory``, and the evaluations of the last run."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .solvers import Solver

__all__ = ["LastRun", "SamplerState"]


@dataclass
class SamplerState:
    """One step of a trajectory.

    Attributes:
        step: the number of the step, from 0.
        timestep: the timestep at which the network was evaluated, an int where it is one of training.
        x: (N, C, H, W) float32, the sample after the step; after the last one, the images. A tensor, or an array from a sampler
            of arrays.
    """

    step: int
    timestep: float
    x: Tensor
    _evaluation: tuple[Solver, Any, Any] = field(repr=False)

    @property
    def before(self) -> Tensor:
        """(N, C, H, W) float32, the sample before the step."""
        return self._evaluation[1]

    @property
    def output(self) -> Tensor:
        """(N, C, H, W) float32: the guided network output for :attr:`before` at ``timestep``."""
        return self._evaluation[2]

    @property
    def x0(self) -> Tensor:
        """(N, C, H, W) float32: the images that the network predicted at ``timestep``. Computed on access."""
        solver, x, output = self._evaluation
        return solver.predict_x0(self.step, x, output)


class LastRun(threading.local):
    """The record of a thread's last run. A copy starts without one.

    Attributes:
        evaluations: (N,) int64, the network evaluations of each image, or None.
    """

    evaluations: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
