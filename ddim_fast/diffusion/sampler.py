"""The sampler: timesteps, solver and starting noise of a denoiser."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..engine import make_engine, select_engine
from ..io.progress import Bar
from ..models.config import DiffusionModel
from ..models.unet import Labels
from ..ops.scalars import plain
from .controlled import check_tolerance, require_steps, sample_controlled
from .degradations import LinearOperator
from .denoiser import Denoiser
from .guidance import Gradient
from .inversion import Inverter
from .loop import Loop, calibrate, initial_noise
from .request import Request
from .restoration import Restorer
from .solvers import FITTED, make_solver, network_timesteps
from .timesteps import choose_fitted, select_timesteps
from .trajectory import LastRun, SamplerState

__all__ = ["Sampler", "SamplerState"]


class Sampler:
    """Turns noise into images and back. Threads may share a sampler: each gets the same images as alone.

    Args:
        model: a :class:`ddim_fast.UNet`; a name or path for :meth:`ddim_fast.UNet.from_pretrained`, such as
            ``Sampler("fashion-mnist")``; any module with a ``config`` like a U-Net's; or a :class:`Denoiser`, whose network,
            dtype, guide and batch invariance several samplers share.
        steps: number of steps S; None with an explicit list of timesteps.
        eta: for the ``ddim`` solver: 0 is DDIM, 1 the variance of DDPM, ``"sigma-hat"`` the larger variance.
        spacing: a name of :func:`ddim_fast.select_timesteps`, or the timesteps themselves; or ``adaptive``, the timesteps
            beside the checkpoint that :func:`ddim_fast.diffusion.adaptive.fit_timesteps` fitted to the model and solver.
        solver: of :data:`ddim_fast.diffusion.solvers.SOLVERS`; ``fitted`` is the timesteps, whatever ``spacing`` says, and
            coefficients beside the checkpoint, by :func:`ddim_fast.diffusion.fitting.fit_solver`.
        engine: ``eager``; ``compiled``, by torch.compile, with one compilation per batch size; ``captured``, the whole loop in
            one CUDA graph or, on a CPU, one plan of C++ operators; or ``auto``, which is eager.
        clip_sample_range: clip the predicted x_0 to [-r, r] at each step; None does not.
        dtype, guide, batch_invariant: options of the :class:`Denoiser` made from a model.
        reuse: an approximation: deep features are computed every ``reuse`` steps; see :class:`ddim_fast.diffusion.loop.Loop`.
        tolerance: the largest estimated error of a step, which controls the step size instead of ``steps`` and ``spacing``: see
            :mod:`ddim_fast.diffusion.controlled`. Each image takes its own steps, so there is no trajectory and no encoding.

    Attributes:
        denoiser: the network with its guide and dtype.
        image_shape: (C, H, W) of the images.
        timesteps: of the network evaluations, an array, noisiest first; not used with a tolerance.
        needs_one_batch_size: whether every batch size costs a preparation, so that a smaller last batch is better padded.
        runs_whole: whether all steps are one call, unless they are watched.

    Raises:
        FileNotFoundError: there is no model of that name.
        ValueError: an option is out of range; the message names it.
    """

    def __init__(
        self,
        model: DiffusionModel | Denoiser | str | Path,
        *,
        steps: int | None = 20,
        eta: float | str = 0.0,
        spacing: str | Sequence[int] = "quadratic",
        solver: str = "ddim",
        engine: str = "auto",
        clip_sample_range: float | None = None,
        dtype: torch.dtype | None = None,
        reuse: int = 1,
        tolerance: float | None = None,
        guide: DiffusionModel | str | Path | None = None,
        batch_invariant: bool | None = None,
    ) -> None:
        steps, eta, clip_sample_range, reuse, tolerance = map(plain, (steps, eta, clip_sample_range, reuse, tolerance))
        check_tolerance(tolerance, eta, solver, engine, reuse)
        self.denoiser = denoiser = Denoiser.of(model, dtype=dtype, guide=guide, batch_invariant=batch_invariant)
        self.model, self.guide, self.networks, self.dtype = denoiser.model, denoiser.guide, denoiser.networks, denoiser.dtype
        self.config, self.schedule, self.image_shape = denoiser.config, denoiser.schedule, denoiser.config.image_shape
        spacing, self._coefficients = choose_fitted(spacing, solver, steps, self.model)
        self._steps, self._spacing = steps if isinstance(spacing, str) else None, spacing
        self._solver, self._clip, self.eta, self.reuse, self.tolerance = solver, clip_sample_range, eta, reuse, tolerance
        self.engine, self._engine = select_engine(engine, self.device), make_engine(engine, self.device)
        self.needs_one_batch_size = self._engine.needs_one_batch_size
        self.runs_whole = self._engine.runs_whole or tolerance is not None
        self._visit(select_timesteps(self.schedule, self._steps, spacing))
        self._later: dict[int, Sampler] = {}
        calibrate(denoiser, self.solver, self.timesteps)

    def __repr__(self) -> str:
        spacing = self._spacing if isinstance(self._spacing, str) else "listed"
        way = f"{len(self._visited)} steps {spacing}" if self.tolerance is None else f"tolerance {self.tolerance}"
        way += (f", eta {self.eta}" if self._solver == "ddim" else "") + (f", reuse {self.reuse}" if self.reuse > 1 else "")
        return f"Sampler({self.denoiser!r}, {self._solver}, {way}, {self.engine})"

    def _visit(self, timesteps: np.ndarray) -> None:
        self._visited, self.timesteps = timesteps, network_timesteps(self._solver, timesteps)
        levels = self.schedule.levels(self.timesteps)
        self.solver = make_solver(self._solver, levels, self.eta, self.config.prediction_type, self._clip, self._coefficients)
        self._loop = Loop(self.denoiser, self.solver, self._engine, self.reuse)
        self._inverter = Inverter(self._loop, timesteps)
        self._restorer = Restorer(self.denoiser, timesteps, self._engine, self._clip)
        self._last_run = LastRun()

    def starting_at(self, timestep: int) -> Sampler:
        """This sampler with the same number of steps from an image at the noise level of ``timestep``, 0 to T - 1; cached per
        timestep. Spacings are computed as if the noise schedule ended there; listed and adaptive timesteps beyond it are left
        out.

        Raises:
            ValueError: the timestep is out of range, no timestep is left, or the sampler has a tolerance.
        """
        timestep = plain(timestep)
        require_steps(self.tolerance, "to start at")
        if self._solver == FITTED:
            raise ValueError("the solver fitted starts from noise only; use another one to start at a timestep")
        if timestep not in self._later:
            steps = self._steps and min(self._steps, timestep + 1)
            later = copy.copy(self)
            later._visit(select_timesteps(self.schedule, steps, self._spacing, timestep))
            self._later.setdefault(timestep, later)
        return self._later[timestep]

    def with_new_engine(self) -> Sampler:
        """This sampler with a new engine, without compiled or captured code. It shares the denoiser, not the solver."""
        other = copy.copy(self)
        other._engine, other._later = make_engine(self.engine, self.device), {}
        other._visit(self._visited)
        return other

    @property
    def evaluations(self) -> Tensor | None:
        """(N,) int64, the network evaluations of each image in this thread's last :meth:`sample`; None before. Evaluations of a
        guide are not counted."""
        return self._last_run.evaluations

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.denoiser.device

    def sample(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: Labels = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: Sequence[int] | None = None,
        gradient: Gradient | None = None,
        batch_size: int = 64,
        on_step: Callable[[SamplerState], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Images from seeds, or from given noise.

        Args:
            seeds: N integers; image i depends on ``seeds[i]`` alone, in any batch. They give x_T, unless it is given, and the
                noise of stochastic sampling.
            x_T: (N, C, H, W) noise or latents to start from.
            labels: class labels, one or N of them, for a class-conditional network; None for no label.
            guidance: scale w of classifier-free guidance, eps_none + w (eps_label - eps_none) (Ho and Salimans 2022), or of
                guidance away from the ``guide``, with the same label or none; or the scale of each step. 1 is no guidance.
            guidance_interval: (t_low, t_high), the timesteps of the guided steps, both included (Kynkaanniemi et al. 2024,
                arXiv 2404.07724); None is all.
            gradient: classifier guidance, a :data:`ddim_fast.diffusion.guidance.Gradient`.
            batch_size: images per network call.
            on_step: called with the state after each step of each batch.
            progress: show a bar that moves with each network evaluation.

        Returns:
            (N, C, H, W) float32 on the network's device, in [-1, 1] as the network was trained, but not clipped: some values
            lie outside. :func:`ddim_fast.save_images` and :func:`ddim_fast.to_pil` clip them.

        Raises:
            ValueError: there are neither seeds nor x_T; seeds, x_T and labels do not match; or a label is out of range. A
                captured run or a tolerance allows no gradient, because nothing can be called between their steps.
        """
        asked = {"seeds": seeds, "labels": labels, "guidance": guidance, "guidance_interval": guidance_interval}
        request = self.check(x_T=x_T, gradient=gradient, **asked)
        if on_step is not None:
            require_steps(self.tolerance, "to look at")

        def compute(batch: Request) -> tuple[Tensor, Tensor]:
            if self.tolerance is not None:
                return sample_controlled(self.denoiser, batch, self.tolerance, self._clip)
            return self._loop.sample(batch, self.timesteps, on_step)

        empty = torch.empty(0, *self.image_shape, dtype=torch.float32, device=self.device), torch.empty(0, dtype=torch.int64)
        with Bar(len(request), shown=progress):
            images, self._last_run.evaluations = request.compute(compute, batch_size, empty, padded=self.needs_one_batch_size)
        return images

    def trajectory(self, **request: Any) -> Iterator[SamplerState]:
        """The states of one batch, one after each step; arguments as in :meth:`sample`, without batch_size and on_step.

        Raises:
            ValueError: as there, or the sampler has a tolerance, and its images share no steps.
        """
        require_steps(self.tolerance, "to look at")
        return self._loop.trajectory(self.check(**request), self.timesteps)

    def check(self, **request: Any) -> Request:
        """Raise the errors of :meth:`sample` for these arguments, without computing anything; else return them as tensors."""
        if request.get("gradient") is not None:
            require_steps(self.tolerance, "to call a gradient between")
        return self._loop.request(steps=len(self.timesteps) if self.tolerance is None else None, **request)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The x_T (N, C, H, W) of :meth:`sample`."""
        return initial_noise(self.check(seeds=seeds), self.denoiser)

    def noised(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """(N, C, H, W) images in [-1, 1] with the noise of the first timestep added (Ho et al. 2020, eq. 4), an x_T for
        :meth:`sample`; the noise is that of :meth:`noise` for the seeds.

        Raises:
            ValueError: the images do not fit the network or the seeds.
        """
        request, level = self.check(seeds=seeds, x_T=images), float(self.schedule.levels(self.timesteps)[0])
        return math.sqrt(level) * request.x_T + math.sqrt(1 - level) * self.noise(seeds)

    def encode(self, images: Tensor, *, exact: bool = False, **options: Any) -> Tensor:
        """The noise x_T (N, C, H, W) float32 from which deterministic DDIM makes ``images``, (N, C, H, W) in [-1, 1], over the
        same timesteps. Arguments and errors as of :meth:`Inverter.encode`: labels, guidance, guidance_interval, batch_size and
        progress as in :meth:`sample`. Exact inversion, of the ``ddim`` solver without clipping and ``reuse``, takes 5 to 42
        evaluations a step."""
        require_steps(self.tolerance, "to invert")
        return self._inverter.encode(images, exact=exact, **options)

    def restore(self, measurement: Tensor, operator: LinearOperator, *, seeds: Sequence[int], **options: Any) -> Tensor:
        """Images that ``operator`` maps to ``measurement``: inpainting, super-resolution, colorization, deblurring. Arguments
        and errors as of :meth:`Restorer.restore`. Timesteps are the sampler's; its solver and eta are not used."""
        require_steps(self.tolerance, "to restore in")
        return self._restorer.restore(measurement, operator, seeds=seeds, **options)

    def restoration_steps(self, operator: LinearOperator, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps and coefficients of :meth:`restore`; see :meth:`Restorer.steps`."""
        require_steps(self.tolerance, "to restore in")
        return self._restorer.steps(operator, **options)
