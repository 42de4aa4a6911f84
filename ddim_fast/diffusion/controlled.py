"""Sampling with a step size that is controlled while sampling: given a tolerance, each image takes the steps that it needs.

Noise level is an angle here (Salimans and Ho 2022, appendix D): signal cos(phi), noise sin(phi), phi from nearly pi/2 down to
0. With the network's prediction of x_0 as a function of phi, the ODE is solved exactly by

    x(psi) = sin(psi) / sin(phi) x(phi) + sin(psi) * integral of x_0 d(cot) from phi to psi.

A constant x_0 gives DDIM, first order. A line through the last two predictions, x_0(phi + h) = x_0 + h s, adds c(phi, psi) s
with

    c(phi, psi) = (psi - phi) cos(psi) - sin(psi) log(sin(psi) / sin(phi)),

a two-step method of second order (a member of the exponential multi-step methods of Zhang and Chen 2023, DEIS, and of Lu et al.
2022b, whose DPM-Solver++ takes x_0 to be a line in the log-SNR instead. The angle has the advantage to be finite at the end, so
the last step to the image is of second order as well).

The pair's embedded error estimate is |c s|, the root mean square of the difference of both. It is known before the step is made
and costs no evaluation, so no step is ever rejected: each image goes to the farthest timestep at which its estimate is within
the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import NoiseSchedule
from .step import step_coefficients

__all__ = ["FIRST_STEP", "solve_controlled"]

# Of the first step nothing is known yet. It is one of first order, this share of the whole angle.
FIRST_STEP = 0.1

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
    levels = torch.from_numpy(schedule.alphas_cumprod[::-1].copy())
    angle = torch.cat([levels.sqrt().acos(), torch.zeros(1, dtype=torch.float64)]).to(device)
    reading = torch.tensor(
        [step_coefficients(float(level), 1.0, 0.0, prediction_type)[:2] for level in levels], dtype=torch.float64, device=device
    )
    first = int((angle - angle[0] * (1 - FIRST_STEP)).abs().argmin().clamp(1, total))

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
            slope = (x0 - previous) / _per_image(angle[place] - angle[before])
            size = slope.double().square().mean(dim=(1, 2, 3)).sqrt()
            curve = _curvature(angle[place][:, None], angle[None, :])
            after = _reach(curve, size, place, tolerance)
            correction = _per_image(curve.gather(1, after[:, None])[:, 0]) * slope
        else:
            after, correction, started = torch.full_like(place, first), 0.0, True
        here, there = angle[place], angle[after]
        shrink = there.sin() / here.sin()
        x, before, previous = (
            _per_image(shrink) * x + _per_image(there.cos() - here.cos() * shrink) * x0 + correction,
            place,
            x0,
        )
        done = after == total
        images[which[done]] = x[done]
        going = ~done
        which, place, before, previous, x = which[going], after[going], before[going], previous[going], x[going]
    return images, evaluations


def _curvature(here: Tensor, there: Tensor) -> Tensor:
    """c(phi, psi) of the module's docstring."""
    sine = there.sin()
    return (there - here) * there.cos() - torch.xlogy(sine, sine / here.sin())


def _reach(curve: Tensor, size: Tensor, place: Tensor, tolerance: float) -> Tensor:
    """The farthest place that each may go to: beyond its own, and up to where its estimate first exceeds the tolerance."""
    places = torch.arange(curve.shape[1], device=curve.device)
    too_far = (curve.abs() * size[:, None] > tolerance) & (places > place[:, None] + 1)
    first_too_far = torch.where(too_far, places, curve.shape[1]).min(dim=1).values
    return first_too_far - 1


def _per_image(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]
