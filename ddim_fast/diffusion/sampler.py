"""The sampler: which timesteps, in which order, from what noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import make_denoiser, select_engine
from ..ops.noise import INITIAL_NOISE, check_seeds, seeded_noise
from .guidance import check_guidance, guided
from .inversion import invert
from .schedule import NoiseSchedule
from .solvers import Solver, make_solver
from .timesteps import select_timesteps

__all__ = ["Sampler", "SamplerState"]


@dataclass
class SamplerState:
    """One step of a trajectory.

    Attributes:
        step: its number, from 0.
        timestep: the training timestep at which the network was evaluated.
        x: (N, C, H, W) float32, the sample after the step; after the last one, the images.
    """

    step: int
    timestep: int
    x: Tensor
    _evaluation: tuple[Solver, Tensor, Tensor] = field(repr=False)

    @property
    def x0(self) -> Tensor:
        """(N, C, H, W) float32: the images as the network predicted them at ``timestep``. Computed when it is asked for."""
        solver, x, output = self._evaluation
        return solver.predict_x0(self.step, x, output)


class Sampler:
    """Turns noise into images and back.

    Args:
        model: the network: a :class:`ddim_fast.UNet`, or any module with a ``config`` like its. It is put in eval mode.
        steps: number of steps S; None with an explicit list of timesteps.
        eta: 0 is DDIM, 1 the variance of DDPM, ``"sigma-hat"`` the larger variance; for the ``ddim`` solver.
        spacing: how the timesteps are chosen, or the timesteps themselves: see :func:`ddim_fast.select_timesteps`.
        solver: ``ddim``, ``ddpm``, ``dpm-solver++`` or ``unipc``.
        engine: ``eager``, ``compiled`` or ``auto``.
        clip_sample_range: clip the predicted x_0 to [-r, r] at each step; None does not.
        dtype: what the network computes in: torch.float32, torch.bfloat16 or torch.float16. The sample itself stays float32.
            For a narrow one a :class:`ddim_fast.UNet` is copied now: later changes of its weights do not reach this sampler.

    Attributes:
        timesteps: (S,) int64 array, noisiest first.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int | None = 20,
        eta: float | str = 0.0,
        spacing: str | Sequence[int] = "quadratic",
        solver: str = "ddim",
        engine: str = "auto",
        clip_sample_range: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.float32, bfloat16 or float16; got {dtype}")
        self.model = model.eval()
        self.config = model.config
        self.schedule = NoiseSchedule.from_config(model.config)
        explicit = not isinstance(spacing, str)
        self.timesteps = select_timesteps(self.schedule, None if explicit else steps, spacing)
        self.eta = eta
        self.engine = select_engine(engine)
        self.dtype = dtype
        # After the last step nothing is left of the noise.
        self._levels = np.append(self.schedule.alphas_cumprod[self.timesteps], 1.0)
        self.solver = make_solver(solver, self._levels, eta, model.config.prediction_type, clip_sample_range)
        self._denoise = make_denoiser(model, self.engine, dtype)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def sample(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        batch_size: int = 64,
        on_step: Callable[[SamplerState], None] | None = None,
    ) -> Tensor:
        """Images from seeds, or from given noise.

        Args:
            seeds: N integers; image i depends on ``seeds[i]`` alone, whatever the batch. They give x_T where it is not given,
                and the noise of stochastic sampling.
            x_T: (N, C, H, W) noise or latents to start from.
            labels: class labels, one or N of them, for a class-conditional network; None for no label.
            guidance: scale w of classifier-free guidance, eps = eps_none + w (eps_label - eps_none) (Ho and Salimans 2022);
                None or 1 for none.
            batch_size: images a network call.
            on_step: called with the state after each step of each batch, for a progress bar or a film.

        Returns:
            (N, C, H, W) float32 on the network's device, in [-1, 1] as the network was trained, not clipped.

        Raises:
            ValueError: neither or mismatched seeds, x_T and labels, or a label out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        run = _Run.check(self, seeds, x_T, labels, guidance)
        images = []
        for start in range(0, len(run), batch_size):
            batch = run[start : start + batch_size]
            full = min(batch_size, len(run))
            # A compiled network is specialised to its batch size: the last, smaller batch is filled up, not compiled anew.
            padded = batch.padded(full) if self.engine == "compiled" else batch
            for state in self._trajectory(padded):
                if on_step is not None:
                    on_step(state)
            images.append(state.x[: len(batch)])
        return torch.cat(images) if images else torch.empty(0, *self.config.image_shape, device=self.device)

    def trajectory(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
    ) -> Iterator[SamplerState]:
        """The states of one batch, one after each step; arguments as in :meth:`sample`."""
        return self._trajectory(_Run.check(self, seeds, x_T, labels, guidance))

    @torch.no_grad()
    def encode(
        self, images: Tensor, *, labels: int | Sequence[int] | Tensor | None = None, guidance: float | None = None
    ) -> Tensor:
        """The noise x_T from which deterministic DDIM makes ``images``: the sampler's ODE followed towards more noise along the
        same timesteps (Song et al. 2021, section 4.3 and eq. 14). Its error falls with the number of steps.

        Args:
            images: (N, C, H, W) in [-1, 1].

        Returns:
            (N, C, H, W) float32: ``sampler.sample(x_T=...)`` gives the images back.

        Raises:
            ValueError: the images do not fit the network, or the sampler is stochastic.
        """
        if self.solver.stochastic:
            raise ValueError("encode needs a deterministic sampler; use eta=0")
        run = _Run.check(self, None, images, labels, guidance)
        denoise = guided(self._denoise, run.guidance, self.config.num_classes)
        return invert(denoise, run.x_T, run.labels, self.timesteps, self._levels, self.config.prediction_type)

    @torch.no_grad()
    def _trajectory(self, run: _Run) -> Iterator[SamplerState]:
        denoise = guided(self._denoise, run.guidance, self.config.num_classes)
        timesteps = torch.from_numpy(self.timesteps).to(self.device)
        x = run.x_T if run.x_T is not None else seeded_noise(run.seeds, INITIAL_NOISE, self.config.image_shape, self.device)
        memory = None
        for i, timestep in enumerate(self.timesteps.tolist()):
            output = denoise(x, timesteps[i], run.labels)
            before = x
            x, memory = self.solver.step(i, x, output, run.seeds, memory)
            yield SamplerState(i, timestep, x, (self.solver, before, output))


@dataclass(frozen=True)
class _Run:
    """What is sampled: checked, and on the device."""

    seeds: Tensor | None
    x_T: Tensor | None
    labels: Tensor | None
    guidance: float | None

    @classmethod
    def check(
        cls,
        sampler: Sampler,
        seeds: Sequence[int] | None,
        x_T: Tensor | None,
        labels: int | Sequence[int] | Tensor | None,
        guidance: float | None,
    ) -> _Run:
        config, device = sampler.config, sampler.device
        if seeds is None and x_T is None:
            raise ValueError("sampling starts from seeds or from x_T; give one of them")
        if seeds is None and sampler.solver.stochastic:
            raise ValueError("a stochastic sampler draws noise by seed; give seeds as well as x_T")
        if x_T is not None:
            if tuple(x_T.shape[1:]) != config.image_shape:
                raise ValueError(
                    f"expected images of shape (N, {', '.join(map(str, config.image_shape))}); got {tuple(x_T.shape)}"
                )
            x_T = x_T.to(device, torch.float32).contiguous()
        count = len(x_T if seeds is None else seeds)
        if x_T is not None and len(x_T) != count:
            raise ValueError(f"{count} seeds do not fit {len(x_T)} images in x_T")
        if seeds is not None:
            seeds = torch.tensor(check_seeds(seeds), dtype=torch.int64, device=device)
        return cls(seeds, x_T, _check_labels(labels, count, config.num_classes, device), check_guidance(guidance, labels))

    def __len__(self) -> int:
        return len(self.x_T if self.seeds is None else self.seeds)

    def __getitem__(self, part: slice) -> _Run:
        return self._map(lambda t: t[part])

    def padded(self, size: int) -> _Run:
        """The same, its last image repeated up to ``size`` images."""
        missing = size - len(self)
        return self._map(lambda t: torch.cat([t, t[-1:].expand(missing, *t.shape[1:])])) if missing else self

    def _map(self, f) -> _Run:
        return _Run(*(None if t is None else f(t) for t in (self.seeds, self.x_T, self.labels)), self.guidance)


def _check_labels(
    labels: int | Sequence[int] | Tensor | None, count: int, num_classes: int | None, device: torch.device
) -> Tensor | None:
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError("the network is unconditional: it takes no class labels")
    checked = torch.as_tensor(labels)
    if checked.is_floating_point() or checked.dtype == torch.bool:
        raise ValueError(f"class labels are whole numbers; got {checked.dtype}")
    checked = checked.expand(count) if checked.ndim == 0 else checked
    if checked.shape != (count,):
        raise ValueError(f"{len(checked)} class labels do not fit {count} images")
    bad = checked[(checked < 0) | (checked >= num_classes)]
    if len(bad):
        raise ValueError(f"class {int(bad[0])} is out of range: the network has classes 0..{num_classes - 1}")
    return checked.to(device, torch.int64)
