"""Sampling with a step size that is controlled while sampling: given a tolerance, each image takes the steps that it needs.

With the network's prediction of x_0 as a function of l = log(alpha / sigma), half the log-SNR, the ODE is solved exactly by
(Lu et al. 2022b, eq. 9)

    x(m) = sigma_m / sigma_l x(l) + sigma_m * integral of e^k x_0(k) dk from l to m.

A constant x_0 gives DDIM, first order. A line through the last two predictions, x_0(l + k) = x_0 + k s, adds c s with

    c = alpha_m (h - 1 + e^-h),   h = m - l:

a two-step method of second order for any step sizes, of the family of DPM-Solver++(2M). The pair's embedded error estimate is
|c s|, the root mean square of the difference of both. It is known before the step is made and costs no evaluation, so no step
is ever rejected: each image goes to the farthest timestep at which its estimate is within the tolerance, but to none that makes
the step more than GROWTH times as long as the one before, because the estimate only knows the past (Hairer, Norsett and Wanner
1993, section II.4, limit the factor for the same reason).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .step import step_coefficients

__all__ = ["FIRST_STEP", "GROWTH", "solve_controlled"]

# Of the first step nothing is known yet. It is one of first order, this share of the whole way in l.
FIRST_STEP = 0.1

# A step is at most this many times as long, in l, as the one before it.
GROWTH = 1.5

Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


def solve_controlled(
    evaluate: Evaluate, x: Tensor, schedule: NoiseSchedule, prediction_type: str, tolerance: float, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The images that belong to noise ``x``.

    Args:
        evaluate: (x, timesteps, which) -> the network's output, for (n, C, H, W) states, (n,) int64 timesteps, and the (n,)
        int64
            numbers of the images that they belong to.
        x: (N, C, H, W) float32, the noise at timestep T - 1.
        tolerance: largest estimated error of a step, root mean square over an image, in units of the sample.
        clip: clip the predicted x_0 to [-r, r]; None does not.

    Returns:
        (N, C, H, W) float32 images, and (N,) int64 network evaluations of each. Both depend on the image alone, whatever else
        is in the batch.
    """
    device, total = x.device, schedule.num_train_timesteps
    # Place k is timestep T - 1 - k, the last one the image.
    levels = np.append(schedule.alphas_cumprod[::-1], 1.0)
    signal, sigma = (torch.from_numpy(np.sqrt(part)).to(device) for part in (levels, 1 - levels))
    where = torch.from_numpy(_half_log_snr(levels)).to(device)
    reading = [step_coefficients(float(level), 1.0, 0.0, prediction_type)[:2] for level in levels[:-1]]
    reading = torch.tensor(reading, dtype=torch.float64, device=device)
    first = int((where - where[0] - FIRST_STEP * (where[-1] - where[0])).abs().argmin().clamp(1, total))

    images, evaluations = torch.empty_like(x), torch.zeros(len(x), dtype=torch.int64, device=device)
    which = torch.arange(len(x), device=device)
    place, before, previous = torch.zeros_like(which), torch.zeros_like(which), torch.zeros_like(x)
    started = False
    while len(which):
        output = evaluate(x, total - 1 - place, which)
        evaluations[which] += 1
        from_x, from_output = (_per_image(column) for column in reading[place].unbind(1))
        x0 = from_x * x + from_output * output
        x0 = x0 if clip is None else x0.clamp(-clip, clip)
        if started:
            way = where[place] - where[before]
            slope = (x0 - previous) / _per_image(way)
            size = slope.double().square().mean(dim=(1, 2, 3)).sqrt()
            h = where - where[place][:, None]
            curve = signal * (h - 1 + torch.exp(-h))
            after = _reach((curve.abs() * size[:, None] > tolerance) | (h > GROWTH * way[:, None]), place)
            correction = _per_image(curve.gather(1, after[:, None])[:, 0]) * slope
        else:
            after, correction, started = torch.full_like(place, first), 0.0, True
        shrink = sigma[after] / sigma[place]
        moved = _per_image(shrink) * x + _per_image(signal[after] - signal[place] * shrink) * x0 + correction
        x, before, previous = moved, place, x0
        done = after == total
        images[which[done]] = x[done]
        going = ~done
        which, place, before, previous, x = which[going], after[going], before[going], previous[going], x[going]
    return images, evaluations


def _half_log_snr(levels: np.ndarray) -> np.ndarray:
    """log(alpha / sigma) of each place. Where that is infinite there is a finite number instead: for the image,
    one more than for the timestep before it; at zero SNR, as far from the next as that is from the one after."""
    with np.errstate(divide="ignore"):
        where = (np.log(levels) - np.log1p(-levels)) / 2
    where[-1] = where[-2] + 1
    if np.isneginf(where[0]):
        where[0] = 2 * where[1] - where[2]
    return where


def _reach(too_far: Tensor, place: Tensor) -> Tensor:
    """The farthest place that each may go to: beyond its own, and before the first of those beyond it that are too far."""
    places = torch.arange(too_far.shape[1], device=place.device)
    beyond = too_far & (places > place[:, None] + 1)
    return torch.where(beyond, places, too_far.shape[1]).min(dim=1).values - 1


def _per_image(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]
