"""Timesteps fitted to a model by the measured errors of the sampler's steps.

A step of DDIM from timestep i to j, starting on the exact trajectory, misses it by

    e(i, j) = step(x_i, output_i; i -> j) - x_j.

On the way to the image, the ODE shrinks an error or spreads it, by a gain g(j) that depends on its place. It is measured by
solving the ODE from x_j with and without such an error. The cost of a step is

    cost(i, j) = (g(j)^c |e(i, j)|)^p,

where |e| is the root mean square over calibration trajectories and frequencies, each frequency counted fully or partly relative
to its power in images (:func:`whitening`). Images have a hundred thousand times more power in the lowest frequencies than in
the highest. Timesteps of the least error in pixels therefore stop at high noise, which makes smooth images. With c = p = 1, the
error in x_0 of a sampler that visits t_1 > ... > t_S is, to first order, at most (Minkowski) the sum of the costs of its steps.
The first step begins at t_1 with the noise of T - 1, and the last one ends at the image. c < 1 corrects gains, which are
measured on small errors: large ones saturate. A second-order solver's error falls with the third power of a step's length,
DDIM's with the second; so it is about the 3/2 power of e. p is larger still if the errors of different steps are uncorrelated.
Dynamic programming finds the timesteps of the smallest sum, for every S at once.

The best of these costs for a model and a solver is found for S = 1 to 10, 15 and 20 by sampling the calibration trajectories
with that solver; spacings from formulas compete. Candidates must be as near to the solution in pixels as quadratic spacing. The
one whose images are nearest with all frequencies counted alike is chosen, because FID was seen to follow that
(benchmarks/results/trajectory-error.md).

Fitting timesteps to a few measured trajectories is the idea of Watson et al. 2021 ("Learning to Efficiently Sample from
Diffusion Probabilistic Models"), who minimise the likelihood bound, also a sum over steps, by the same dynamic programme.
Sabour et al. 2024 ("Align Your Steps") minimise a bound on the error of the solver. Xue et al. 2024 ("Accelerating Diffusion
Sampling with Optimized Time Steps") minimise a bound from the solver's coefficients, without trajectories.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..io.progress import Bar, watch
from ..models.config import DiffusionModel
from .denoiser import Denoiser
from .prediction import prediction_coefficients
from .sampler import Sampler
from .schedule import NoiseSchedule
from .timesteps import select_timesteps

__all__ = ["cheapest_paths", "fit_timesteps", "step_errors", "whitening"]

# The ODE solutions for gains: their steps, and the approximate size of the error to follow.
_FLOW_STEPS, _FOLLOWED = 16, 0.03

# The number of timesteps at which gains are measured; others are interpolated.
_GAINS = 10

# The candidate costs: every share of whitening with every c; p by solver; and the spacings that compete.
_WHITENED = (0.25, 0.5, 1.0)
_GAIN_POWERS = (0.5, 0.75, 1.0)
_ERROR_POWER = {"ddim": 1.0, "dpm-solver++": 2.0, "unipc": 2.0}
_RIVALS = ("linear", "quadratic", "trailing")

# A choice is never further from the solution, in pixels, than this spacing.
_BOUND = "quadratic"

# The power of 8-bit rounding, with levels 2/255 apart: weaker frequencies count as having it.
_ROUNDING = (2 / 255) ** 2 / 12

# The S for which candidates are sampled. Other S take the best kind of the S before.
_MEASURED = (*range(1, 11), 15, 20)


def fit_timesteps(
    model: DiffusionModel,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    most: int = 100,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    progress: bool = False,
) -> dict[str, dict[int, list[int]]]:
    """The best timesteps of 1 to ``most`` steps.

    Args:
        model: as :class:`ddim_fast.Sampler` takes it.
        seeds, labels: of the calibration trajectories. Sixteen are enough; they cost about 5 T network evaluations each.
        on_step: called with (network evaluations made, their largest number), counted for the batch.
        progress: show a bar that moves with each of them.

    Returns:
        The timesteps, falling, by solver and then by S from 1.
    """
    total = model.config.num_train_timesteps
    most = min(most, total)
    tried = len(_ERROR_POWER) * (len(_WHITENED) * len(_GAIN_POWERS) + len(_RIVALS)) * sum(s for s in _MEASURED if s <= most)
    evaluations, done = total + 2 * _FLOW_STEPS * len(_gains_at(total)) + tried, 0

    with Bar(evaluations, "network evaluations", shown=progress) as bar:

        def evaluated(images: float, calls: int) -> None:
            nonlocal done
            done += calls
            bar.made(done)
            on_step(done, evaluations)

        with watch(evaluated):
            return _fit(model, seeds, labels, most)


def _gains_at(total: int) -> np.ndarray:
    """The places at which gains are measured, without the first timestep, to which no step leads."""
    places = np.round(np.linspace(0, 1, _GAINS + 1)[1:] * (total - 1)).clip(1).astype(np.int64)
    return np.unique(places)[: total - 1]


def _fit(
    model: DiffusionModel, seeds: Sequence[int], labels: Sequence[int] | None, most: int
) -> dict[str, dict[int, list[int]]]:
    schedule, denoiser = NoiseSchedule.from_config(model.config), Denoiser(model)
    total = schedule.num_train_timesteps
    exact = Sampler(denoiser, steps=total, spacing="linear")
    gains_at = _gains_at(total)
    states, outputs = [], []
    for state in exact.trajectory(seeds=seeds, labels=labels):
        states.append(state.before.cpu())
        outputs.append(state.output.cpu())
    states.append(state.x.cpu())
    x, output = torch.stack(states), torch.stack(outputs)
    errors, _, error_of = step_errors(x, output, schedule, model.config.prediction_type)
    followed = []
    for j in gains_at:
        error = error_of(int(np.abs(errors[:j, j] - _FOLLOWED).argmin()), int(j))
        followed.append((error, _follow(denoiser, exact.timesteps, int(j), x[j], error, labels)))

    @functools.cache
    def costs(share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        whiten = whitening(x[-1], share)
        errors, start, _ = step_errors(whiten(x), whiten(output), schedule, model.config.prediction_type)
        gains = [_size(whiten(after)) / _size(whiten(before)) for before, after in followed]
        return errors, start, np.interp(np.arange(total + 1), [*gains_at, total], [*gains, 1.0])

    @functools.cache
    def cheapest(share: float, c: float, p: float) -> dict[int, list[int]]:
        errors, start, gain = costs(share)
        paths = cheapest_paths((errors * gain**c) ** p, (start * gain[:total] ** c) ** p, most)
        return {steps: exact.timesteps[path].tolist() for steps, path in paths.items()}

    whiten = whitening(x[-1], 1.0)

    @functools.cache
    def missed(solver: str, timesteps: tuple[int, ...]) -> tuple[float, float]:
        sampler = Sampler(denoiser, steps=None, spacing=timesteps, solver=solver)
        difference = sampler.sample(x_T=x[0], labels=labels, batch_size=len(x[0])).cpu() - x[-1]
        return _size(difference), _size(whiten(difference))

    rivals = {spacing: {s: select_timesteps(schedule, s, spacing).tolist() for s in range(1, most + 1)} for spacing in _RIVALS}
    chosen: dict[str, dict[int, list[int]]] = {}
    for solver, power in _ERROR_POWER.items():
        candidates = [cheapest(*cost) for cost in itertools.product(_WHITENED, _GAIN_POWERS, [power])] + [*rivals.values()]
        chosen[solver] = {}
        for steps in range(1, most + 1):
            if steps in _MEASURED:
                bound, _ = missed(solver, tuple(rivals[_BOUND][steps]))
                near = [timesteps for timesteps in candidates if missed(solver, tuple(timesteps[steps]))[0] <= bound]
                best = min(near, key=lambda timesteps: missed(solver, tuple(timesteps[steps]))[1])
            chosen[solver][steps] = best[steps]
    return chosen


def step_errors(
    x: Tensor, output: Tensor, schedule: NoiseSchedule, prediction_type: str
) -> tuple[np.ndarray, np.ndarray, Callable[[int, int], Tensor]]:
    """The errors of DDIM steps from states of a trajectory to later ones. No network is evaluated: a step is linear in the
    state and the output at its start, so inner products give all errors.

    Args:
        x: (T + 1, N, ...) float32, the states of the trajectory at each timestep from T - 1 to 0, then the images.
        output: (T, N, ...) float32, the network's output at each.

    Returns:
        (T, T + 1) float64: the root mean square of e(i, j), infinite where j is not after i; (T,) float64: that of x_i minus
        the noise at the start, the error of beginning at i; and a function (i, j) -> e(i, j), like x[0].
    """
    total = len(output)
    levels = np.append(schedule.alphas_cumprod[::-1], 1.0)
    prediction = np.array([prediction_coefficients(float(level), prediction_type) for level in levels[:-1]])
    signal, noise = np.sqrt(levels), np.sqrt(1 - levels)
    from_x = np.outer(prediction[:, 0], signal) + np.outer(prediction[:, 2], noise)
    from_output = np.outer(prediction[:, 1], signal) + np.outer(prediction[:, 3], noise)

    flat, out = x.flatten(1).double(), output.flatten(1).double()
    xx, ox = ((rows @ flat.T / flat.shape[1]).numpy() for rows in (flat, out))
    oo, i = out.square().mean(1).numpy(), np.arange(total)
    square = from_x**2 * xx[i, i][:, None] + from_output**2 * oo[:, None] + np.diag(xx)
    square += 2 * (from_x * from_output * ox[i, i][:, None] - from_x * xx[:total] - from_output * ox)
    errors = np.sqrt(np.maximum(square, 0))
    errors[np.tril_indices(total, 0, total + 1)] = np.inf
    start = (flat[:1] - flat[:total]).square().mean(1).sqrt().numpy()
    return errors, start, lambda i, j: (from_x[i, j] * x[i] + from_output[i, j] * output[i] - x[j]).float()


def whitening(images: Tensor, share: float) -> Callable[[Tensor], Tensor]:
    """A linear map after which the mean square of a difference counts frequencies relative to their power in images.

    It is the orthonormal DCT-II of the last two dimensions. Each coefficient is divided by the root mean square of those of
    ``images`` near its frequency, to the power ``share`` (Field 1987: power falls with the square of the frequency). A share of
    0 leaves root mean squares unchanged, 1 counts all frequencies alike.

    Args:
        images: (N, C, H, W) float32 in [-1, 1].
        share: from 0 to 1.
    """
    height, width = images.shape[-2:]
    rows, columns = _cosines(height).to(images.device), _cosines(width).to(images.device)

    def transform(x: Tensor) -> Tensor:
        return rows @ x @ columns.T

    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)
    band = np.round(frequency * max(height, width)).astype(np.int64)
    power = transform(images).double().square().mean(dim=(0, 1)).cpu().numpy()
    power = np.bincount(band.ravel(), power.ravel()) / np.maximum(np.bincount(band.ravel()), 1)
    weight = torch.from_numpy(np.maximum(power, _ROUNDING)[band] ** (-share / 2)).float().to(images.device)
    return lambda x: transform(x) * weight


def _cosines(size: int) -> Tensor:
    """(size, size), the orthonormal DCT-II."""
    k, n = np.arange(size)[:, None], np.arange(size)
    cosines = np.cos(np.pi * (n + 0.5) * k / size) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    return torch.from_numpy(cosines).float()


def cheapest_paths(cost: np.ndarray, start: np.ndarray, most: int) -> dict[int, list[int]]:
    """The cheapest path from the start to the end in exactly S steps, for S from 1 to ``most``.

    Args:
        cost: (T, T + 1), the cost of the step from place i to place j; infinite if there is none. Place T is the end.
        start: (T,), the cost of beginning at place i.

    Returns:
        By S, the S places before the end, rising.
    """
    places = len(start)
    came_from: list[np.ndarray] = []
    best, paths = start, {}
    for steps in range(1, most + 1):
        last = int((best + cost[:, places]).argmin())
        path = [last]
        for before in reversed(came_from):
            path.append(int(before[path[-1]]))
        paths[steps] = path[::-1]
        through = best[:, None] + cost[:, :places]
        came_from.append(through.argmin(axis=0))
        best = through.min(axis=0)
    return paths


def _follow(
    denoiser: Denoiser,
    timesteps: np.ndarray,
    j: int,
    x: Tensor,
    error: Tensor,
    labels: Sequence[int] | None,
) -> Tensor:
    """The error in the image caused by ``error`` in the state at place j of ``timesteps``."""
    # Quadratic in the place, so that steps are small where the error matters.
    share = 1 - np.linspace(1, 0, _FLOW_STEPS, endpoint=False) ** 2
    places = np.unique((j + share * (len(timesteps) - j)).astype(np.int64))
    flow = Sampler(denoiser, steps=None, spacing=timesteps[places].tolist())
    exact, wrong = (flow.sample(x_T=start, labels=labels, batch_size=len(x)).cpu() for start in (x, x + error))
    return wrong - exact


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
