"""A solver fitted to a model: the timesteps and coefficients with which few steps come nearest to the images of many.

The start is UniPC with the model's adaptive timesteps. Then the timesteps and all nine numbers of each row of the table
(:class:`ddim_fast.diffusion.solvers.Fitted`) are moved by Levenberg and Marquardt's method towards the images that a teacher,
UniPC in more steps, makes of the same noise. All frequencies count alike in the distance (:func:`whitening`), because FID was
seen to follow it, and all images count alike in its mean. Derivatives are differences: a change in one step needs only the
evaluations of the later steps, and no network is differentiated. After six tenths of the iterations the timesteps are rounded,
and only the coefficients move on. The solver that is best on held-out noise is kept. The start is one of them, so a fitted
solver is never further from its teacher there than UniPC.

Timesteps were learned from a teacher's images by Tong et al. 2025 (LD3, "Learning to Discretize Denoising Diffusion ODEs"), and
the coefficients of multi-step solvers by Frankel et al. 2025 (S4S), both by gradient descent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import inference
from ..io.progress import Bar, tell
from ..models.config import DiffusionModel
from .adaptive import whitening
from .denoiser import Denoiser
from .sampler import Sampler
from .solvers import Fitted, State
from .timesteps import distinct, unipc_timesteps

__all__ = ["FittedSolver", "fit_solver"]

# The part of the iterations in which the timesteps move, and the factors by which each iteration tries to change the damping.
_MOVING, _DAMPINGS = 0.6, (0.03, 0.3, 3.0, 30.0)

# By how much numbers are moved for a derivative: timesteps; and coefficients, relative to themselves or to the second number.
_MOVE_TIMESTEP, _MOVE, _SMALL = 0.5, 1e-3, 0.3

# Of the largest diagonal element of the normal equations: what the damping of each number is at least.
_TINY = 1e-12

# Images in a call of the network.
_BATCH = 64


class FittedSolver(NamedTuple):
    """The result of :func:`fit_solver`.

    Attributes:
        timesteps: S, falling.
        coefficients: (S, 9), the rows of :class:`ddim_fast.diffusion.solvers.Fitted`.
        before, after: the mean whitened distance to the teacher's images on held-out noise, of UniPC and of this solver.
    """

    timesteps: list[int]
    coefficients: list[list[float]]
    before: float
    after: float


@inference()
def fit_solver(
    model: DiffusionModel | Denoiser | str | Path,
    steps: int,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    guidance_interval: Sequence[int] | None = None,
    teacher_steps: int = 20,
    iterations: int = 10,
    progress: bool = False,
) -> FittedSolver:
    """Fit the solver ``fitted`` for a number of steps.

    Args:
        model: as :class:`ddim_fast.Sampler` takes it.
        steps: S, from 2.
        seeds, labels: of the noise; half of it is held out. 96 are enough.
        guidance, guidance_interval: as of :meth:`ddim_fast.Sampler.sample`, for the fit and its teacher.
        teacher_steps: the steps of UniPC whose images are to be met, with adaptive timesteps where the model has them.
        iterations: each takes about 5 S^2 evaluations for each seed that is not held out.
        progress: show a bar.

    Raises:
        ValueError: a number is out of range.
    """
    if not 2 <= steps < teacher_steps:
        raise ValueError(f"a solver is fitted for 2 steps or more, and fewer than its teacher's {teacher_steps}; got {steps}")
    if len(seeds) < 4:
        raise ValueError(f"a solver is fitted on the noise of 4 seeds or more; got {len(seeds)}")
    denoiser = model if isinstance(model, Denoiser) else Denoiser(model)
    teacher, start = (
        Sampler(denoiser, steps=None, spacing=unipc_timesteps(denoiser.model, denoiser.schedule, n), solver="unipc")
        for n in (teacher_steps, steps)
    )
    condition: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval}
    noise = teacher.noise(seeds)
    images = teacher.sample(x_T=noise, labels=labels, batch_size=_BATCH, progress=progress, **condition)
    whiten, half = whitening(images, 1.0), len(seeds) // 2
    classes = None if labels is None else torch.tensor(labels, device=denoiser.device)
    last = denoiser.config.num_train_timesteps - 1

    # The solver as numbers: in each row a timestep and the nine coefficients.
    numbers = np.column_stack([start.timesteps, start.solver.table.astype(np.float64)])
    free = np.ones(numbers.shape, dtype=bool)
    free[-1, 1:] = False  # the last step ends at the network's own x_0: other sums leave noise in even areas
    cost = half * steps * (5 * steps + len(_DAMPINGS) + 1)  # about the evaluations of an iteration
    with Bar(iterations, "iterations", shown=progress) as bar:
        on, held_out = (
            _Images(denoiser, noise[part], None if classes is None else classes[part], condition, whiten, images[part], cost)
            for part in (slice(half), slice(half, None))
        )
        reached, damping, best, equations = on.distance(numbers), 1e-2, numbers.copy(), None
        before = after = held_out.distance(numbers)
        for i in range(iterations):
            if free[0, 0] and i >= _MOVING * iterations:
                numbers[:, 0] = distinct(numbers[::-1, 0].round().astype(np.int64), last + 1)[::-1]
                free[:, 0], reached, equations = False, on.distance(numbers), None
            hessian, gradient = equations = equations or on.normal_equations(numbers, free)
            tried = []
            for factor in _DAMPINGS:
                diagonal = np.diag(hessian)
                moved = numbers.copy()
                moved[free] -= np.linalg.solve(
                    hessian + np.diag(factor * damping * (diagonal + _TINY * diagonal.max())), gradient
                )
                moved[:, 0] = moved[:, 0].clip(0, last)
                tried.append((on.distance(moved), factor * damping, moved))
            nearest = min(tried, key=lambda attempt: attempt[0])
            if nearest[0] < reached:
                (reached, damping, numbers), equations = nearest, None
            else:
                damping *= max(_DAMPINGS)
            if not free[0, 0] and (distance := held_out.distance(numbers)) < after:
                after, best = distance, numbers.copy()
            bar.made(i + 1)
    return FittedSolver(best[:, 0].astype(int).tolist(), best[:, 1:].tolist(), before, after)


class _Images:
    """The images of some noise, as a function of the numbers of a solver: (S, 10), in each row a timestep and the coefficients.

    Args:
        noise: (N, C, H, W).
        labels: (N,), or None.
        condition: guidance and its interval.
        whiten: the linear map after which distances are measured.
        wanted: (N, C, H, W), the teacher's images.
        cost: the evaluations that a progress bar counts as 1.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        labels: Tensor | None,
        condition: dict[str, Any],
        whiten: Callable[[Tensor], Tensor],
        wanted: Tensor,
        cost: int,
    ) -> None:
        self._denoiser, self._labels, self._condition = denoiser, labels, condition
        self._noise, self._whiten, self._wanted, self._cost = noise, whiten, whiten(wanted).flatten(1), cost
        self._solver = Fitted(np.zeros((1, 9)))
        self._first = torch.zeros((), dtype=torch.int64, device=noise.device)

    def distance(self, numbers: np.ndarray) -> float:
        """The mean distance to the wanted images; infinite where a number overflowed."""
        distance = self._missed(self._path(numbers)[-1][0]).square().mean(1).sqrt().mean().item()
        return distance if np.isfinite(distance) else np.inf

    def normal_equations(self, numbers: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """J^T J and J^T r of the distances r by the free numbers. Images are weighted by the inverses of their distances, so
        that the sum of squares falls as the mean distance does."""
        path = self._path(numbers)
        made, missed = self._whiten(path[-1][0][0]).flatten(1), self._missed(path[-1][0])
        weight = missed.square().mean(1).rsqrt().sqrt()[:, None]
        rows = []
        for i, ((state, output), may) in enumerate(zip(path, free, strict=False)):
            columns = np.flatnonzero(may)
            if not len(columns):
                continue
            moves = [_MOVE_TIMESTEP if c == 0 else _MOVE * max(abs(numbers[i, c]), _SMALL) for c in columns]
            moved: list[State] = []
            for column, move in zip(columns, moves, strict=True):
                row = numbers[i].copy()
                row[column] += move
                there = self._predict(state[0], row[0]) if column == 0 else output
                moved.append(self._solver.combine(state, there, row[1:].tolist()))
            end = tuple(torch.cat(tensors) for tensors in zip(*moved, strict=True))
            for row in numbers[i + 1 :]:
                end = self._solver.combine(end, self._predict(end[0], row[0]), row[1:].tolist())
            change = self._whiten(end[0]).flatten(1).unflatten(0, (len(columns), -1)) - made
            rows.append((weight * change).flatten(1) / torch.tensor(moves, device=change.device)[:, None])
        jacobian, r = torch.cat(rows).double(), (weight * missed).flatten().double()
        return (jacobian @ jacobian.T).cpu().numpy(), (jacobian @ r).cpu().numpy()

    def _path(self, numbers: np.ndarray) -> list[tuple[State, Tensor | None]]:
        """The state before each step with the network's output there, and the state in the end."""
        state, path = self._solver.start(self._noise), []
        for row in numbers:
            output = self._predict(state[0], row[0])
            path.append((state, output))
            state = self._solver.combine(state, output, row[1:].tolist())
        return [*path, (state, None)]

    def _missed(self, end: State) -> Tensor:
        """(N, C H W), the whitened difference to the wanted images."""
        return self._whiten(end[0]).flatten(1) - self._wanted

    def _predict(self, x: Tensor, timestep: float) -> Tensor:
        """The denoiser's prediction for the noise's images, or for several times as many."""
        labels = None if self._labels is None else self._labels.repeat(len(x) // len(self._labels))
        outputs = []
        for of in torch.arange(len(x), device=x.device).split(_BATCH):
            there = torch.full((len(of),), timestep, device=x.device)
            conditions = self._denoiser.conditions_each(there, None if labels is None else labels[of], **self._condition)
            outputs.append(self._denoiser(x[of], conditions, self._first)[0])
            tell(len(of) / self._cost)
        return torch.cat(outputs)
