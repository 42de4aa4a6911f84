"""Sampling with an error-controlled step size: given a tolerance, each image takes as many steps as it needs.

With the network's prediction of x_0 as a function of l = log(alpha / sigma), half the log-SNR, the ODE is solved exactly by
(Lu et al. 2022b, eq. 9)

    x(m) = sigma_m / sigma_l x(l) + sigma_m * integral of e^k x_0(k) dk from l to m.

A constant x_0 gives DDIM, of first order. If x_0 changes by a known d over the step h = m - l, the second-order step adds

    alpha_m (1 - e^-h) d / 2.

The predictor takes d from the slope of the previous step, times h: DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), for any
step sizes. The network is then evaluated at the new state, which gives d, and the corrector repeats the step with it, like
UniPC's (Zhao et al. 2023). Their difference, over alpha_m, is the pair's embedded estimate of the error, in units of the image.
If its root mean square exceeds the tolerance, the step is repeated with a smaller h. The estimate falls with the third power of
h and sets the next step size (Hairer, Norsett and Wanner 1993, section II.4). Every attempt costs one evaluation; the corrector
costs none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..engine import inference
from ..io.progress import tell
from ..ops.scalars import is_finite
from .denoiser import Denoiser
from .loop import initial_noise
from .prediction import prediction_coefficients
from .request import Request
from .schedule import NoiseSchedule

__all__ = ["check_tolerance", "require_steps", "sample_controlled", "solve_controlled"]

# The length of the first step, before any estimate, as a share of the whole range of l.
_FIRST_STEP = 0.12

# The next step is _SAFETY times the estimate's length, within these multiples of the last one.
_SAFETY, _SHRINK, _GROWTH = 0.7, 0.3, 2.0

Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_tolerance(tolerance: float | None, eta: float | str, solver: str, engine: str, reuse: int) -> None:
    """Check that a sampler's options allow a tolerance, if there is one.

    Raises:
        ValueError: they do not, or the tolerance is not a positive number.
    """
    if tolerance is None:
        return
    if not is_finite(tolerance) or tolerance <= 0:
        raise ValueError(f"tolerance must be a positive number; got {tolerance!r}")
    if engine not in ("auto", "eager"):
        raise ValueError(
            f"the {engine} engine needs fixed steps, but with a tolerance each image takes steps of its own; use engine "
            "eager, or fixed steps"
        )
    if reuse != 1:
        raise ValueError(f"reuse={reuse} needs fixed steps, but with a tolerance each image takes steps of its own")
    if eta != 0 or solver != "ddim":
        raise ValueError(
            f"a tolerance has a deterministic solver of its own: eta must be 0 and solver ddim; got {eta}, {solver}"
        )


def require_steps(tolerance: float | None, purpose: str) -> None:
    """Check that a sampler with this tolerance, or None, has steps for ``purpose``, such as "to look at".

    Raises:
        ValueError: it has a tolerance.
    """
    if tolerance is not None:
        raise ValueError(f"with a tolerance each image takes steps of its own, so there are none {purpose}; use fixed steps")


@inference()
def sample_controlled(
    denoiser: Denoiser, request: Request, tolerance: float, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The images of a request, as tensors, and (N,) int64 network evaluations of each; see :func:`solve_controlled`."""
    index = torch.zeros((), dtype=torch.int64, device=denoiser.device)

    def evaluate(x: Tensor, timesteps: Tensor, which: Tensor) -> Tensor:
        labels = None if request.labels is None else request.labels[which]
        assert not isinstance(request.guidance, tuple)  # Request.check refuses it where steps are not shared
        conditions = denoiser.conditions_each(timesteps, labels, request.guidance, request.guidance_interval)
        return denoiser(x, conditions, index)[0]

    x, prediction_type = initial_noise(request, denoiser), denoiser.config.prediction_type
    images, evaluations = solve_controlled(evaluate, x, denoiser.schedule, prediction_type, tolerance, clip)
    twice = request.guidance is not None and denoiser.guide is None
    return images, evaluations.cpu() * (2 if twice else 1)


def solve_controlled(
    evaluate: Evaluate, x: Tensor, schedule: NoiseSchedule, prediction_type: str, tolerance: float, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The images of noise ``x``.

    Args:
        evaluate: (x, timesteps, which) -> the network's output, for (n, C, H, W) states, (n,) int64 timesteps, and the (n,)
            int64 numbers of their images.
        x: (N, C, H, W) float32, the noise at timestep T - 1.
        tolerance: largest estimated error of a step, root mean square over an image, in units of the images.
        clip: clip the predicted x_0 to [-r, r]; None does not.

    Returns:
        (N, C, H, W) float32 images, and (N,) int64 network evaluations of each. Both depend on the image alone, not on the
        batch.
    """
    device, total = x.device, schedule.num_train_timesteps
    # Place k is timestep T - 1 - k.
    levels = schedule.alphas_cumprod[::-1]
    signal, sigma = (torch.from_numpy(np.sqrt(part)).to(device) for part in (levels, 1 - levels))
    where = torch.from_numpy(_half_log_snr(levels)).to(device)
    rows = [prediction_coefficients(float(level), prediction_type)[:2] for level in levels]
    prediction = torch.tensor(rows, dtype=torch.float64, device=device)
    last = total - 1
    end = where[last]  # the image is the network's prediction at timestep 0

    images, evaluations = torch.empty_like(x), torch.zeros(len(x), dtype=torch.int64, device=device)
    which = torch.arange(len(x), device=device)
    place = torch.zeros_like(which)
    slope = torch.zeros_like(x)  # of x_0 in l, if known
    h = (_FIRST_STEP * (end - where[0])).expand(len(x))

    def predicted_image(x: Tensor, place: Tensor, which: Tensor) -> Tensor:
        output = evaluate(x, total - 1 - place, which)
        evaluations[which] += 1
        from_x, from_output = (_per_image(column) for column in prediction[place].unbind(1))
        x0 = from_x * x + from_output * output
        return x0 if clip is None else x0.clamp(-clip, clip)

    x0 = predicted_image(x, place, which)
    tell(0)
    while len(which):
        target = torch.searchsorted(where, where[place] + h, right=True) - 1
        target = torch.maximum(target, place + 1).clamp(max=last)
        h = where[target] - where[place]
        shrink, weight = sigma[target] / sigma[place], -torch.expm1(-h)
        first_order = _per_image(shrink) * x + _per_image(signal[target] - signal[place] * shrink) * x0
        bend = _per_image(signal[target] * weight / 2)
        x0_there = predicted_image(first_order + bend * (_per_image(h) * slope), target, which)
        change = x0_there - x0
        missed = _size(change - _per_image(h) * slope) * weight / 2
        # A step with a non-finite result is not repeated: a smaller one would not help.
        broken = ~torch.isfinite(missed)
        made = (missed <= tolerance) | (target == place + 1) | broken
        factor = (_SAFETY * (tolerance / missed.clamp(min=1e-12)) ** (1 / 3)).clamp(_SHRINK, _GROWTH)

        keep = made[:, None, None, None]
        x = torch.where(keep, first_order + bend * change, x)
        slope = torch.where(keep, change / _per_image(h), slope)
        x0 = torch.where(keep, x0_there, x0)
        before, place = place, torch.where(made, target, place)
        h = h * factor
        rest = _per_image((end - where[place]) / 2) * slope
        done = made & ((place == last) | (_size(rest) <= tolerance)) | broken
        images[which[done]] = (x0 + rest)[done]
        tell(float((torch.where(done, end, where[place]) - where[before]).sum() / (end - where[0])))
        going = ~done
        which, place, x, x0, slope, h = (value[going] for value in (which, place, x, x0, slope, h))
    return images, evaluations


def _half_log_snr(levels: np.ndarray) -> np.ndarray:
    """log(alpha / sigma) of each place. At zero SNR it is infinite; that place counts as being as far from the next as the next
    is from the one after."""
    with np.errstate(divide="ignore"):
        where = (np.log(levels) - np.log1p(-levels)) / 2
    if np.isneginf(where[0]):
        where[0] = 2 * where[1] - where[2]
    return where


def _size(difference: Tensor) -> Tensor:
    """(N,) float64: the root mean square over each image."""
    return difference.double().square().mean(dim=(1, 2, 3)).sqrt()


def _per_image(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]
