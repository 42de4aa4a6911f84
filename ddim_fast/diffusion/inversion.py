"""DDIM inversion: from images to their noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import inference
from ..io.progress import Bar, tell
from .loop import Inputs, Loop
from .request import Request
from .solvers import DDIM, DDIMUpdate, Solver
from .step import StepCoefficients, step_coefficients

__all__ = ["Inverter", "inverse_step", "inversion"]

# inverse_step stops at an error of this share of the image (root mean square), near float32 rounding; after this many
# evaluations without progress; or after this many in all.
ENOUGH, PATIENCE, MOST = 1e-6, 8, 60

# The number of earlier evaluations that it uses.
MEMORY = 3


class Inverter:
    """Finds the noise x_T from which deterministic DDIM makes given images: solves the sampler's ODE towards more noise on the
    same timesteps (Song et al. 2021, section 4.3 and eq. 14).

    Args:
        loop: the sampler's.
        timesteps: (S,) of the sampler, noisiest first.
    """

    def __init__(self, loop: Loop[Solver], timesteps: np.ndarray) -> None:
        self._sampling, self._timesteps, denoiser = loop, timesteps, loop.denoiser
        levels = denoiser.schedule.levels(timesteps)
        self._evaluated, update = inversion(timesteps, levels, denoiser.config.prediction_type)
        self._loop = Loop(denoiser, update, loop.engine)

    @inference()
    def encode(
        self, images: Tensor, *, exact: bool = False, batch_size: int = 64, progress: bool = False, **condition: Any
    ) -> Tensor:
        """The noise of images. The error of Euler steps falls with their number.

        Args:
            images: (N, C, H, W) in [-1, 1].
            exact: solve for the inverse of each step of the sampler, by :func:`inverse_step`: the images come back up to
                rounding. With the packaged models, a step takes 5 or 6 network evaluations in runs of 50 steps, 6 to 11 in 20,
                8 to 17 in 10, and 20 to 42 in 5. The slowest image of a batch decides; 60 is the limit.
            batch_size: images per network call.
            progress: show a bar that moves with each network evaluation.
            condition: labels, guidance and guidance_interval as in :meth:`ddim_fast.Sampler.sample`.

        Returns:
            (N, C, H, W) float32.

        Raises:
            ValueError: the images do not fit the network, or the sampler has no inverse.
        """
        loop = self._sampling
        if loop.solver.stochastic:
            raise ValueError("encode needs a deterministic sampler; use solver ddim and eta=0")
        request = loop.request(x_T=images, **condition)
        if exact and (not isinstance(loop.solver, DDIM) or loop.solver.clip is not None or loop.reuse > 1):
            raise ValueError("encode(exact=True) inverts steps of the ddim solver, without clipping and with reuse=1")
        function, padded = self._encode_exactly if exact else self._encode, loop.engine.needs_one_batch_size
        with Bar(len(request), shown=progress):
            return request.compute(lambda batch: (function(batch),), batch_size, (request.x_T[:0],), padded=padded)[0]

    def _encode(self, request: Request) -> Tensor:
        return self._loop.last(self._loop.prepare(request, self._evaluated, self._loop.solver.table))

    def _encode_exactly(self, request: Request) -> Tensor:
        loop: Loop[Any] = self._sampling
        inputs, unguided, _ = loop.prepare(request, self._timesteps, loop.solver.table)
        without = inputs._replace(conditions=inputs.conditions.unguided())
        x = inputs.x
        for number, coefficients in reversed(list(enumerate(loop.solver.coefficients))):
            here = without if number in unguided else inputs

            def step(x: Tensor, here: Inputs = here, index: Tensor = inputs.steps[number]) -> Tensor:
                tell(0)
                return loop.engine.call(loop.step, (x,), here, index)[0][0]

            x = inverse_step(step, coefficients, x)
            tell(len(x) / len(inputs.steps), evaluations=0)
        return x


def inversion(timesteps: np.ndarray, alphas_cumprod: np.ndarray, prediction_type: str) -> tuple[np.ndarray, DDIMUpdate]:
    """DDIM inversion: Euler steps of the sampler's ODE towards more noise (Song et al. 2021, eq. 14).

    Each step evaluates the network at its starting level. The images are evaluated at the first timestep, the network's least
    noisy one.

    Args:
        timesteps: (S,) of the sampler, noisiest first.
        alphas_cumprod: (S + 1,) their noise levels, then the images'.
        prediction_type: the network's prediction type.

    Returns:
        The timesteps at which the network is evaluated, in order, and the steps: from images to x at ``timesteps[0]``.
    """
    levels = alphas_cumprod[::-1].copy()
    if prediction_type == "sample":
        # Without noise a sample prediction does not determine epsilon: the images count as x at the first timestep.
        levels[0] = levels[1]
    evaluated = np.concatenate([timesteps[-1:], timesteps[:0:-1]])
    pairs = pairwise(float(level) for level in levels)
    return evaluated, DDIMUpdate([step_coefficients(a, b, 0.0, prediction_type) for a, b in pairs])


def inverse_step(step: Callable[[Tensor], Tensor], coefficients: StepCoefficients, y: Tensor) -> Tensor:
    """The x from which a DDIM step leads to ``y``; :func:`inversion` approximates it with the network's output at y. The step
    is x -> a x + b output(x), so x is the fixed point of x -> x + (y - step(x)) / a (Pan et al. 2023, arXiv 2309.04907).
    Anderson's acceleration finds it (1965; Walker and Ni 2011, SIAM J. Numer. Anal. 49); the plain iteration diverges in the
    large steps of a short run. Each image stops by itself at its best x, independent of the batch.

    Args:
        step: the function from x, (N, C, H, W) float32, to y.
        coefficients: the coefficients of the step, with sigma 0.
        y: (N, C, H, W) float32.

    Returns:
        x. If the iteration does not converge, it is the x whose step ends nearest to y.
    """
    slope = _slope(coefficients)
    enough = ENOUGH * _size(y)
    x = best = y
    least, waiting = torch.full_like(enough, torch.inf), torch.zeros_like(enough)
    points: list[Tensor] = []
    corrections: list[Tensor] = []
    for _ in range(MOST):
        residual = y - step(x)
        error = _size(residual)
        better = error < least
        best, least = torch.where(better, x, best), torch.where(better, error, least)
        waiting = torch.where(better, 0, waiting + 1)
        searching = (least > enough) & (waiting < PATIENCE)
        if not searching.any():
            break
        points, corrections = [*points[-MEMORY:], x], [*corrections[-MEMORY:], residual / slope]
        x = torch.where(searching, _accelerated(points, corrections), x)
    return best


def _slope(step: StepCoefficients) -> float:
    """The derivative of the step's result by x with a constant network output; for a network that predicts x_0, with an output
    that follows the change."""
    if step.x0_from_sample == 0 and step.x0_from_output == 1 and step.eps_from_output != 0:
        return -step.prev_from_x0 * step.eps_from_sample / step.eps_from_output
    return step.prev_from_x0 * step.x0_from_sample + step.prev_from_eps * step.eps_from_sample


def _accelerated(points: list[Tensor], corrections: list[Tensor]) -> Tensor:
    """The next x, from the last ones and their corrections by the plain iteration: the combination of their differences that
    explains most of the last correction is subtracted."""
    x, correction = points[-1], corrections[-1]
    if len(points) == 1:
        return x + correction
    of_points, of_corrections = (
        torch.stack([b - a for a, b in pairwise(values)], dim=1).flatten(2).double() for values in (points, corrections)
    )
    # Sums over one image at a time, in an order independent of the batch.
    products = (of_corrections[:, :, None] * of_corrections[:, None]).sum(-1)
    target = (of_corrections * correction.flatten(1)[:, None]).sum(-1)
    # An image that has stopped has differences of zero.
    ridge = 1e-10 * products.diagonal(dim1=1, dim2=2).sum(-1) + torch.finfo(torch.float64).tiny
    weights = torch.linalg.solve(products + ridge[:, None, None] * torch.eye(products.shape[1]).to(products), target)
    explained = (weights[:, :, None] * (of_points + of_corrections)).sum(1)
    return x + correction - explained.view_as(x).float()


def _size(images: Tensor) -> Tensor:
    """(N, 1, 1, 1), the root mean square of each image."""
    return images.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
