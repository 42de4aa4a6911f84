"""Timesteps fitted to a model: chosen by what the sampler's steps were measured to get wrong.

A step of DDIM from timestep i to j, starting on the exact trajectory, misses it by

    e(i, j) = step(x_i, output_i; i -> j) - x_j.

What becomes of an error on the way to the image depends on where it is made: the ODE shrinks it, or spreads it. The gain g(j)
is by how much, measured by solving the ODE from x_j with and without such an error. The cost of a step is

    cost(i, j) = (g(j)^c |e(i, j)|)^p,

where |e| is the root mean square over calibration trajectories and frequencies, each frequency counted relative to what the
images have of it, or partly so (:func:`whitening`): images have a hundred thousand times the power in low frequencies that
they have in the highest, and timesteps of the least error in pixels stop where much noise is left, which makes smooth images.
With c = p = 1, the error in x_0 of a sampler that visits t_1 > ... > t_S is, to first order, at most (Minkowski) the sum of the
costs of its steps, the first being to begin at t_1 with the noise that belongs to T - 1, the last to end at the image. c < 1
allows for gains being those of small errors, where large ones saturate. What a solver of second order misses falls with the
third power of a step's length, where DDIM's falls with the second, so that it is about the 3/2 power of e; and p is larger
still if the errors of different steps are uncorrelated. Dynamic programming finds the timesteps of the smallest sum, for every
S at once.

Which of these costs describes a model and a solver, and whether a spacing from a formula does better than all of them, is
measured for S = 1 to 10, 15 and 20 by sampling the calibration trajectories themselves with that solver: of the timesteps that
are as near to the solution in pixels as quadratic spacing, those are chosen whose images are the nearest with all frequencies
counted alike, which is what FID was seen to follow (benchmarks/results/trajectory-error.md).

That few measured trajectories say which timesteps a model needs is the idea of Watson et al. 2021 ("Learning to Efficiently
Sample from Diffusion Probabilistic Models"), who minimise the likelihood bound, a sum over steps too, by the same dynamic
programme; Sabour et al. 2024 ("Align Your Steps") minimise a bound on the error of the solver instead, and Xue et al. 2024
("Accelerating Diffusion Sampling with Optimized Time Steps") a bound from the solver's coefficients without any trajectory.
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

# Of the flow from which gains are measured: its steps, and the error that is followed, of about this size.
_FLOW_STEPS, _FOLLOWED = 16, 0.03

# Timesteps at which gains are measured; between them they are interpolated.
_GAINS = 10

# The costs that are tried, every share of whitening with every c; p by solver; and the spacings that have to be beaten.
_WHITENED = (0.25, 0.5, 1.0)
_GAIN_POWERS = (0.5, 0.75, 1.0)
_ERROR_POWER = {"ddim": 1.0, "dpm-solver++": 2.0, "unipc": 2.0}
_RIVALS = ("linear", "quadratic", "trailing")

# Nothing is chosen that is further from the solution, in pixels, than this one.
_BOUND = "quadratic"

# The power of 8-bit images' rounding, 2/255 a level: what is weaker counts as if it had that.
_ROUNDING = (2 / 255) ** 2 / 12

# The S for which candidates are sampled. For those between and beyond, the kind that was the best for the S before is taken.
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
        seeds, labels: of the calibration trajectories. Sixteen do; they cost about 5 T network evaluations each.
        on_step: called with (network evaluations made, the most there may be), counted for the batch.
        progress: show a bar that moves with each of them.

    Returns:
        By solver, and then by S, from 1, the timesteps, falling.
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
    """The places at which gains are measured, but for the first timestep, to which no step leads."""
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
    state and the output at its start, so all of them follow from inner products.

    Args:
        x: (T + 1, N, ...) float32, the states of the trajectory at each timestep from T - 1 to 0, then the images.
        output: (T, N, ...) float32, what the network returned at each.

    Returns:
        (T, T + 1) float64: the root mean square of e(i, j), infinite where j is not after i; (T,) float64: that of x_i minus
        the noise at the start, which is what beginning at i gets wrong; and a function (i, j) -> e(i, j), like x[0].
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
    """A linear map after which the mean square of a difference counts frequencies relative to what images have of them.

    It is the orthonormal DCT-II of the last two dimensions, each coefficient over the root mean square of those that ``images``
    have at about its frequency (Field 1987: their power falls with its square), to the power ``share``: 0 leaves root mean
    squares as they are, 1 counts all frequencies alike.

    Args:
        images: (N, C, H, W) float32 in [-1, 1].
        share: from 0 to 1.
    """
    height, width = images.shape[-2:]
    rows, columns = _cosines(height), _cosines(width)

    def transform(x: Tensor) -> Tensor:
        return rows @ x @ columns.T

    frequency = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width)
    band = np.round(frequency * max(height, width)).astype(np.int64)
    power = transform(images).double().square().mean(dim=(0, 1)).numpy()
    power = np.bincount(band.ravel(), power.ravel()) / np.maximum(np.bincount(band.ravel()), 1)
    weight = torch.from_numpy(np.maximum(power, _ROUNDING)[band] ** (-share / 2)).float()
    return lambda x: transform(x) * weight


def _cosines(size: int) -> Tensor:
    """(size, size), the orthonormal DCT-II."""
    k, n = np.arange(size)[:, None], np.arange(size)
    cosines = np.cos(np.pi * (n + 0.5) * k / size) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    return torch.from_numpy(cosines).float()


def cheapest_paths(cost: np.ndarray, start: np.ndarray, most: int) -> dict[int, list[int]]:
    """The cheapest way from the start to the end in exactly S steps, for S from 1 to ``most``.

    Args:
        cost: (T, T + 1), of the step from place i to place j; infinite where there is none. Place T is the end.
        start: (T,), of beginning at place i.

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
    """The error in the image that ``error`` in the state at place j of ``timesteps`` leads to."""
    # Quadratic in the place, as the steps that the error is followed by should be small where it matters.
    share = 1 - np.linspace(1, 0, _FLOW_STEPS, endpoint=False) ** 2
    places = np.unique((j + share * (len(timesteps) - j)).astype(np.int64))
    flow = Sampler(denoiser, steps=None, spacing=timesteps[places].tolist())
    exact, wrong = (flow.sample(x_T=start, labels=labels, batch_size=len(x)).cpu() for start in (x, x + error))
    return wrong - exact


def _size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
