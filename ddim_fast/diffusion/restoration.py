"""Restoration by null-space projection: inpainting, super-resolution, colorization and deblurring by a network that was not
trained for them.

Each step keeps the part of the predicted x_0 in the null space of a linear operator A and takes the other part from the
measurement: x_0 + A^+ (y - A x_0) (Wang, Yu and Zhang 2023, DDNM, arXiv 2212.00490, eq. 13). With a noisy measurement, it takes
a share of the correction that shrinks with the noise of the step (ibid., eq. 17 to 19, "DDNM+"). Time travel goes back a few
steps and repeats them, so that the two parts agree better (ibid., algorithm 3; Lugmayr et al. 2022, RePaint).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine import Engine, inference
from ..io.progress import Bar, count_of
from ..ops.ddim_step import ddim_step
from ..ops.noise import INITIAL_NOISE, check_seeds, seeded_noise
from ..ops.scalars import is_finite, is_whole, plain
from .degradations import LinearOperator
from .denoiser import Denoiser
from .loop import Loop, initial_noise
from .prediction import prediction_coefficients
from .request import as_tensor
from .step import step_coefficients

__all__ = ["Codec", "Restoration", "Restorer", "TimeTravel", "inconsistency", "measure", "restoration_steps"]

State = tuple[Tensor, ...]

# The step number of a measurement's noise; sampling steps count from 0.
_MEASUREMENT_NOISE = INITIAL_NOISE - 1


def measure(operator: LinearOperator, images: Tensor, noise_std: float, seeds: Sequence[int]) -> Tensor:
    """y = A x + n.

    Args:
        images: (N, C, H, W) in [-1, 1].
        noise_std: standard deviation of the Gaussian noise n.
        seeds: N integers, the seeds of the noise.

    Returns:
        N measurements.
    """
    clean = operator(images)
    return clean + noise_std * seeded_noise(seeds, _MEASUREMENT_NOISE, clean.shape[1:], clean.device) if noise_std else clean


def inconsistency(operator: LinearOperator, images: Tensor, measurement: Tensor) -> Tensor:
    """(N,) the largest ``|A x - y|`` of each image."""
    return (operator(images) - measurement.to(images)).abs().flatten(1).amax(dim=1)


@dataclass(frozen=True)
class TimeTravel:
    """Time travel: every ``length`` steps are taken ``repeats`` times; noise is added at their end to return to their
    beginning.

    Raises:
        ValueError: a number is not positive.
    """

    length: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "repeats"):
            value = plain(getattr(self, name))
            if not is_whole(value) or value < 1:
                raise ValueError(f"time travel needs a {name} of 1 or more; got {value!r}")
            object.__setattr__(self, name, value)

    def steps(self, count: int) -> Iterator[tuple[int, int]]:
        """For each step of a run over ``count`` timesteps: the numbers of the timesteps where it starts and ends; ``count``
        means no noise."""
        for first in range(0, count, self.length):
            last = min(first + self.length, count) - 1
            for repeat in range(self.repeats):
                for i in range(first, last + 1):
                    again = i == last and repeat < self.repeats - 1
                    yield i, first if again else i + 1


def restoration_steps(
    timesteps: np.ndarray,
    alphas_cumprod: np.ndarray,
    prediction_type: str,
    operator: LinearOperator,
    *,
    eta: float = 0.85,
    noise_std: float = 0.0,
    travel: TimeTravel | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The steps of a restoration.

    Args:
        timesteps: (S,) of the sampler, noisiest first.
        alphas_cumprod: (S + 1,) their noise levels, then 1.
        prediction_type: the network's prediction type.
        operator: the degradation, whose gain scales the measurement's noise.
        eta: the noise of each step, 0 to 1 (eq. 16 of Song et al. 2021).
        noise_std: standard deviation of the measurement's noise.
        travel: time travel, or None.

    Returns:
        The timesteps at which the network is evaluated, in order, and a (steps, 10) float32 table: the coefficients of
        :func:`ddim_fast.ddim_step` from x and the corrected x_0, two coefficients of x_0 from x and the network's output, and
        the share of the measurement.

    Raises:
        ValueError: an option is out of range.
    """
    eta, noise_std = plain(eta), plain(noise_std)
    if not is_finite(noise_std) or noise_std < 0:
        raise ValueError(f"noise_std must be a number of 0 or more; got {noise_std!r}")
    evaluated, rows = [], []
    levels = [float(level) for level in alphas_cumprod]
    for i, end in (travel or TimeTravel()).steps(len(timesteps)):
        start, reached = levels[i], levels[i + 1]
        prediction = prediction_coefficients(start, prediction_type)[:2]
        step = step_coefficients(start, reached, eta, "sample")
        # Going back adds another Gaussian, q(x_end | x_reached), so both steps are one.
        kept = levels[end] / reached
        to_x0, to_eps = math.sqrt(kept) * step.prev_from_x0, math.sqrt(kept) * step.prev_from_eps
        sigma = math.sqrt(kept * step.sigma**2 + (1 - kept))
        # The step's noise is reduced by the noise that the measurement adds to x; if that is more, only a share of it is taken.
        theirs = to_x0 * operator.gain * noise_std
        share, sigma = (1.0, math.sqrt(sigma**2 - theirs**2)) if theirs <= sigma else (sigma / theirs, 0.0)
        evaluated.append(timesteps[i])
        rows.append((*step[:4], to_x0, to_eps, sigma, *prediction, share))
    return np.array(evaluated), np.array(rows, dtype=np.float32)


class Codec(Protocol):
    """An autoencoder: :class:`ddim_fast.diffusion.latent.LatentCodec`."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Restoration:
    """The solver of a restoration: a DDIM step consistent with a measurement y. It serves any number of runs: its coefficients
    are those of :func:`restoration_steps`, and A^+ y enters a run with the noise, see :meth:`pack`.

    In latent space the measurement is of decoded images. There x_0 moves by the encoded correction of its image, E(x + A^+ (y -
    A x)) - E(x) with x = D(x_0). So the autoencoder's losses do not accumulate over the steps.

    Args:
        operator: the operator A, on the device of the runs.
        shape: (C, H, W) of the network's images or latents.
        image_shape: (C, H, W) of the back-projection A^+ y, the decoded images' with a codec.
        clip: clip the network's x_0 to [-r, r]; None does not.
        codec: the codec of the latents; None if the network denoises images.
    """

    stochastic = True

    def __init__(
        self,
        operator: LinearOperator,
        shape: tuple[int, ...],
        image_shape: tuple[int, ...],
        clip: float | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.operator = operator
        self.shape = shape
        self.image_shape = image_shape
        self.clip = clip
        self.codec = codec

    def pack(self, noise: Tensor, back_projection: Tensor) -> Tensor:
        """(N, ...): x_T and A^+ y of N images, packed as a run's x."""
        return torch.cat([noise.flatten(1), back_projection.flatten(1)], dim=1)

    def start(self, x: Tensor) -> State:
        noise, back_projection = x.tensor_split([math.prod(self.shape)], dim=1)
        return noise.unflatten(1, self.shape).contiguous(), back_projection.unflatten(1, self.image_shape).contiguous()

    def step(self, state: State, output: Tensor, table: Tensor, index: Tensor, seeds: Tensor | None) -> State:
        x, back_projection = state
        from_sample, from_output, share = table.index_select(0, index.reshape(1))[0, 7:].unbind()
        x0 = from_sample * x + from_output * output
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        if self.codec is None:
            x0 = self.corrected(x0, back_projection, share)
        else:
            images = self.codec.decode(x0)
            x0 = x0 + self.codec.encode(self.corrected(images, back_projection, share)) - self.codec.encode(images)
        return ddim_step(x, x0.contiguous(), table[:, :7].contiguous(), None, seeds=seeds, step=index), back_projection

    def corrected(self, images: Tensor, back_projection: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """x + share A^+ (y - A x), ``back_projection`` being A^+ y."""
        # In this order the measured part of x is the measurement itself, if A and its inverse copy values and the share is 1.
        return images - share * self.operator.pseudo_inverse(self.operator(images)) + share * back_projection


class Restorer:
    """Restores images from measurements.

    Args:
        denoiser: shared with the sampler.
        timesteps: (S,) of the sampler, noisiest first.
        engine: executes the steps.
        clip_sample_range: clip the predicted x_0 to [-r, r] in each step; None does not.
    """

    def __init__(
        self, denoiser: Denoiser, timesteps: np.ndarray, engine: Engine, clip_sample_range: float | None = None
    ) -> None:
        self._denoiser, self._timesteps, self._engine, self._clip = denoiser, timesteps, engine, clip_sample_range
        self._loop: Loop[Restoration] | None = None

    @inference()
    def restore(
        self,
        measurement: Tensor,
        operator: LinearOperator,
        *,
        seeds: Sequence[int],
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        eta: float = 0.85,
        noise_std: float = 0.0,
        travel: TimeTravel | None = None,
        codec: Codec | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images that ``operator`` maps to ``measurement``; the network fills in the rest.

        Args:
            measurement: N measurements of images in [-1, 1].
            operator: the degradation, such as ``Downscale(4)`` of :mod:`ddim_fast.diffusion.degradations`.
            seeds: N integers, one per image; each seed gives another image that fits the same measurement.
            labels, guidance: as in :meth:`ddim_fast.Sampler.sample`.
            eta: 0 to 1, the noise of each step.
            noise_std: standard deviation of the noise in the measurement, in units of images in [-1, 1].
            travel: time travel, for operators that measure little.
            codec: for a network of latents, their codec; :class:`ddim_fast.diffusion.latent.LatentSampler` gives its own, and
                returns images.
            progress: show a bar that moves with each network evaluation.

        Returns:
            (N, C, H, W) float32 on the network's device, images or latents. Without noise, ``operator`` maps the images to the
            measurement, up to rounding.

        Raises:
            ValueError: the measurement does not fit the operator, the seeds or the network.
        """
        denoiser = self._denoiser
        operator = operator.to(denoiser.device)
        measurement = as_tensor(measurement).to(denoiser.device, torch.float32)
        if len(measurement) != len(seeds := check_seeds(seeds)):
            raise ValueError(f"{count_of(len(seeds), 'seeds')} for {count_of(len(measurement), 'measurements')}; give one each")
        timesteps, table = self.steps(operator, eta=eta, noise_std=noise_std, travel=travel)
        back_projection = operator.pseudo_inverse(measurement)
        shape, expected = tuple(back_projection.shape[1:]), denoiser.config.image_shape
        if codec is None and shape != expected:
            raise ValueError(f"the measurement is of images of shape {shape}, but the network's are {expected}")
        loop = self._loop_of(operator, codec, shape)
        request = loop.request(seeds=seeds, labels=labels, guidance=guidance)
        x = loop.solver.pack(initial_noise(request, denoiser), back_projection)
        with Bar(len(request), shown=progress):
            return loop.last(loop.prepare(request, timesteps, table, x))

    def steps(
        self, operator: LinearOperator, *, eta: float = 0.85, noise_std: float = 0.0, travel: TimeTravel | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps and coefficients of :meth:`restore`, as :func:`restoration_steps` returns them."""
        schedule, prediction_type = self._denoiser.schedule, self._denoiser.config.prediction_type
        levels = schedule.levels(self._timesteps)
        return restoration_steps(
            self._timesteps, levels, prediction_type, operator, eta=eta, noise_std=noise_std, travel=travel
        )

    def _loop_of(self, operator: LinearOperator, codec: Codec | None, shape: tuple[int, ...]) -> Loop[Restoration]:
        """The loop of restorations, kept for further measurements by the same operator, because an engine may have compiled its
        step."""
        loop = self._loop
        if loop is None or (loop.solver.operator, loop.solver.codec, loop.solver.image_shape) != (operator, codec, shape):
            solver = Restoration(operator, self._denoiser.config.image_shape, shape, self._clip, codec)
            loop = self._loop = Loop(self._denoiser, solver, self._engine)
        return loop
