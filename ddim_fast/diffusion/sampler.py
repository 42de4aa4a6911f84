"""The sampler: which timesteps, in which order, from what noise."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..engine import Engine, Network, OneStep, Run, Update, inference, make_engine, select_engine
from ..ops.noise import INITIAL_NOISE, check_seeds, seeded_noise
from ..ops.scalars import is_finite, plain
from .controlled import solve_controlled
from .degradations import LinearOperator
from .guidance import ClassifierGuidance, Gradient, check_guide, guided_steps
from .inversion import inverse_step, inversion
from .request import check_batch_size
from .restoration import Codec, Restoration, TimeTravel, restoration
from .schedule import NoiseSchedule
from .solvers import DDIM, make_solver
from .tensor_request import TensorRequest, as_tensor
from .timesteps import ADAPTIVE, choose_fitted, select_timesteps
from .trajectory import SamplerState

__all__ = ["Sampler", "SamplerState"]


class Sampler:
    """Turns noise into images and back. Threads may share a sampler: each gets the images that it would get alone.

    Args:
        model: the network: a :class:`ddim_fast.UNet`, or any module with a ``config`` like its. It is put in eval mode. A U-Net
            is copied now, laid out for inference on its device: later changes do not reach this sampler.
        steps: number of steps S; None with an explicit list of timesteps.
        eta: 0 is DDIM, 1 the variance of DDPM, ``"sigma-hat"`` the larger variance; for the ``ddim`` solver.
        spacing: how the timesteps are chosen, or the timesteps themselves: see :func:`ddim_fast.select_timesteps`; or
            ``adaptive``, those fitted to the model (:func:`ddim_fast.diffusion.adaptive.fit_timesteps`), which lie beside its
            checkpoint. They are fitted to the solver, without guidance; ``ddpm`` has those of ``ddim``.
        solver: ``ddim``, ``ddpm``, ``dpm-solver++`` or ``unipc``.
        engine: ``eager``; ``compiled``, by torch.compile, one compilation a batch size; ``captured``, the whole loop in one
            CUDA graph, for GPUs; or ``auto``, which is eager.
        clip_sample_range: clip the predicted x_0 to [-r, r] at each step; None does not.
        dtype: what the network computes in: torch.float32, torch.bfloat16 or torch.float16; or torch.int8, for the convolutions
            of a U-Net on a CPU, whose scales are found now, on a few images. The sample itself stays float32.
        reuse: the U-Net computes its deep features in every ``reuse``-th step, beginning with the first, and extrapolates them
            in the steps between, which cost about a tenth then: see :meth:`ddim_fast.UNet.denoise_reusing`. An approximation,
            but for 1. A batch keeps two tensors of the first level's size. :meth:`encode`, which is for getting the same images
            back, evaluates all of the network in each step.
        tolerance: control the step size while sampling, instead of ``steps`` and ``spacing``: the largest estimated error of a
            step, see :mod:`ddim_fast.diffusion.controlled`. Each image takes steps of its own, whatever the batch, so there is
            no run of fixed steps to compile or capture, no common trajectory, and :meth:`encode` is not available.
        guide: a worse network for the same images, smaller or trained for less long. ``guidance`` then leads away from what it
            predicts, eps = eps_guide + w (eps - eps_guide), with the same label or none (autoguidance; Karras et al. 2024,
            arXiv 2406.02507), instead of away from what the network itself predicts without the label. With dtype torch.int8
            it computes in the narrowest other one that is fast there.
        batch_invariant: an image of a U-Net is the same to the last bit alone and in any batch, in eager mode on a CPU. Where
            an operator of PyTorch's sums in another order for a single image, it computes that image twice; False saves that.

    Attributes:
        timesteps: (S,) int64 array, noisiest first; not what is visited with a tolerance.
        evaluations: (N,) int64, how often the network was evaluated for each image of this thread's last :meth:`sample`; None
            before. Evaluations of a guide are not counted.

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
        reuse: int = 1,
        tolerance: float | None = None,
        guide: nn.Module | None = None,
        batch_invariant: bool = True,
    ) -> None:
        steps, eta, clip_sample_range, reuse, tolerance = map(plain, (steps, eta, clip_sample_range, reuse, tolerance))
        if tolerance is not None:
            _check_tolerance(tolerance, eta, solver, engine, reuse)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or int8; got {dtype}")
        self.model = model.eval()
        self.config = model.config
        self.schedule = NoiseSchedule.from_config(model.config)
        if isinstance(spacing, str) and spacing == ADAPTIVE:
            spacing = choose_fitted(getattr(model, "fitted_timesteps", None), solver, steps)
        self._steps, self._spacing = steps if isinstance(spacing, str) else None, spacing
        self.tolerance = tolerance
        self._clip = clip_sample_range
        self.eta = eta
        self._network = Network(self.model, dtype, batch_invariant=batch_invariant)
        self.guide, self._guide = guide, None
        if guide is not None:
            check_guide(model.config, guide.config)
            self._guide = Network(guide.eval(), dtype, batch_invariant=batch_invariant)
        self.engine = select_engine(engine, self.device)
        self.dtype = dtype
        self.reuse = reuse
        self._solver = solver
        self._take_timesteps(select_timesteps(self.schedule, self._steps, spacing))
        self._later: dict[int, Sampler] = {}
        if dtype == torch.int8:
            self._network.quantise(self._sample_for_calibration)
        self._last_restoring: Engine | None = None

    def _take_timesteps(self, timesteps: np.ndarray) -> None:
        """All that depends on the timesteps."""
        self.timesteps = timesteps
        # After the last step nothing is left of the noise.
        self._levels = np.append(self.schedule.alphas_cumprod[timesteps], 1.0)
        self.solver = make_solver(self._solver, self._levels, self.eta, self.config.prediction_type, self._clip)
        self._engine = self._engine_of(self.solver, self.reuse)
        self._inversion: tuple[np.ndarray, Engine] | None = None

    def _engine_of(self, update: Update, reuse: int = 1) -> Engine:
        return make_engine(self.engine, OneStep(self._network, update, reuse, self._guide))

    def starting_at(self, timestep: int) -> Sampler:
        """This sampler for the last part of the way, in as many steps: its x_T is an image with the noise of its first
        timestep. The network is shared, and the same sampler is returned for the same timestep.

        Args:
            timestep: 0 to T - 1; spacings are made as if the noise schedule ended there, and of listed or adaptive timesteps
                those up to it are left.

        Raises:
            ValueError: there is no such timestep, no timestep is left, or the sampler has a tolerance.
        """
        timestep = plain(timestep)
        if self.tolerance is not None:
            raise ValueError("with a tolerance sampling starts from noise alone; name steps instead")
        if timestep not in self._later:
            steps = self._steps and min(self._steps, timestep + 1)
            later = copy.copy(self)
            later._take_timesteps(select_timesteps(self.schedule, steps, self._spacing, timestep))
            self._later.setdefault(timestep, later)
        return self._later[timestep]

    @property
    def evaluations(self) -> Tensor | None:
        return _of_thread.evaluations.get(self)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self._network.device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.image_shape

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that decides what an image is made of."""
        return (self.model,) if self.guide is None else (self.model, self.guide)

    @property
    def runs_whole(self) -> bool:
        """Whether all steps are one call, unless somebody watches them."""
        return self.engine == "captured" or self.tolerance is not None

    def sample(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[int] | None = None,
        gradient: Gradient | None = None,
        batch_size: int = 64,
        on_step: Callable[[SamplerState], None] | None = None,
    ) -> Tensor:
        """Images from seeds, or from given noise.

        Args:
            seeds: N integers; image i depends on ``seeds[i]`` alone, whatever the batch. They give x_T where it is not given,
                and the noise of stochastic sampling.
            x_T: (N, C, H, W) noise or latents to start from.
            labels: class labels, one or N of them, for a class-conditional network; None for no label.
            guidance: scale w of classifier-free guidance, eps = eps_none + w (eps_label - eps_none) (Ho and Salimans 2022), or
                of guidance away from the sampler's ``guide``; None or 1 for none.
            guidance_interval: (t_low, t_high), the timesteps of the steps that are guided, both included; outside, the network
                is evaluated once (Kynkaanniemi et al. 2024, arXiv 2404.07724). None for all steps.
            gradient: classifier guidance (Dhariwal and Nichol 2021): a function (x_t, timestep, x_0) -> the gradient of
                log p(condition | x_t) with respect to x_t, its scale included. x_t is a batch of (n, C, H, W) float32, timestep
                a () int64 tensor beside it, and x_0 what the network predicts there. It is called in each step, with gradients
                enabled, and is not compiled. :func:`ddim_fast.diffusion.guidance.likelihood_gradient` makes one from a function
                of x_0.
            batch_size: images a network call.
            on_step: called with the state after each step of each batch, for a progress bar or a film.

        Returns:
            (N, C, H, W) float32 on the network's device, in [-1, 1] as the network was trained, not clipped.

        Raises:
            ValueError: neither or mismatched seeds, x_T and labels; a label out of range; or a gradient where a run is captured
                or has a tolerance, so that nothing can be called between its steps.
        """
        request = TensorRequest.check(self, seeds, x_T, labels, guidance, guidance_interval, gradient)
        if self.tolerance is not None:
            if on_step is not None:
                raise ValueError(_NO_STEPS)
            counts = [torch.empty(0, dtype=torch.int64)]
            images = self._in_batches(request, batch_size, lambda batch: self._sample_controlled(batch, counts))
            _of_thread.evaluations[self] = torch.cat(counts)
            return images
        guided = guided_steps(self.timesteps, request.guidance, request.guidance_interval)
        again = int(guided.sum()) if self.guide is None else 0
        images = self._in_batches(request, batch_size, lambda batch: self._sample(batch, on_step))
        _of_thread.evaluations[self] = torch.full((len(request),), len(guided) + again)
        return images

    def trajectory(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[int] | None = None,
        gradient: Gradient | None = None,
    ) -> Iterator[SamplerState]:
        """The states of one batch, one after each step; arguments as in :meth:`sample`.

        Raises:
            ValueError: as there, or the sampler has a tolerance: its images have no steps in common.
        """
        if self.tolerance is not None:
            raise ValueError(_NO_STEPS)
        return self._trajectory(TensorRequest.check(self, seeds, x_T, labels, guidance, guidance_interval, gradient))

    def noised(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images in the noise of the first timestep (Ho et al. 2020, eq. 4), as an x_T of :meth:`sample`.

        Args:
            images: (N, C, H, W) in [-1, 1].
            seeds: N integers, one an image, which :meth:`sample` would make the same noise from.

        Returns:
            (N, C, H, W) float32 on the network's device.

        Raises:
            ValueError: the images do not fit the network or the seeds.
        """
        request = TensorRequest.check(self, seeds, images, None, None)
        level = float(self._levels[0])
        noise = seeded_noise(request.seeds, INITIAL_NOISE, self.config.image_shape, self.device)
        return math.sqrt(level) * request.x_T + math.sqrt(1 - level) * noise

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """The x_T (N, C, H, W) that :meth:`sample` starts from."""
        return self._initial(TensorRequest.check(self, seeds, None, None, None))

    def check(
        self,
        *,
        seeds: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[int] | None = None,
    ) -> None:
        """Raises what :meth:`sample` would raise for these arguments, without computing anything."""
        TensorRequest.check(self, seeds, x_T, labels, guidance, guidance_interval)

    @inference()
    def encode(
        self,
        images: Tensor,
        *,
        labels: int | Sequence[int] | Tensor | None = None,
        guidance: float | None = None,
        guidance_interval: Sequence[int] | None = None,
        exact: bool = False,
        batch_size: int = 64,
    ) -> Tensor:
        """The noise x_T from which deterministic DDIM makes ``images``: the sampler's ODE followed towards more noise along the
        same timesteps (Song et al. 2021, section 4.3 and eq. 14). Its error falls with the number of steps.

        Args:
            images: (N, C, H, W) in [-1, 1].
            labels, guidance, guidance_interval: as in :meth:`sample`.
            exact: solve for the inverse of each step, by five to ten evaluations of the network a step, more where steps are
                few: the images come back but for rounding. See :func:`ddim_fast.diffusion.inversion.inverse_step`. For the
                ``ddim`` solver, without clipping or ``reuse``.
            batch_size: images a network call.

        Returns:
            (N, C, H, W) float32: ``sampler.sample(x_T=...)`` gives the images back.

        Raises:
            ValueError: the images do not fit the network, or the sampler has no inverse.
        """
        if self.solver.stochastic or self.tolerance is not None:
            raise ValueError("encode needs a deterministic sampler of fixed steps; use solver ddim, eta=0 and no tolerance")
        request = TensorRequest.check(self, None, images, labels, guidance, guidance_interval)
        if exact:
            return self._in_batches(request, batch_size, self._encode_exactly)
        if self._inversion is None:
            timesteps, update = inversion(self.timesteps, self._levels, self.config.prediction_type)
            self._inversion = timesteps, self._engine_of(update)
        timesteps, engine = self._inversion
        return self._in_batches(
            request, batch_size, lambda batch: engine.last(self._run(batch, timesteps, engine.one_step.update.table))
        )

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
    ) -> Tensor:
        """Images of which ``operator`` makes ``measurement``, filled in by the network: inpainting, super-resolution,
        colorization, deblurring, by null-space projection (see :mod:`ddim_fast.diffusion.restoration`). Timesteps are the
        sampler's, its solver and eta are not used.

        Args:
            measurement: N measurements of images in [-1, 1].
            operator: what was measured, such as ``Downscale(4)`` of :mod:`ddim_fast.diffusion.degradations`.
            seeds: N integers, one an image: another seed is another image that explains the same measurement.
            labels, guidance: as in :meth:`sample`.
            eta: 0 to 1, the noise of each step.
            noise_std: standard deviation of the noise in the measurement, in units of images in [-1, 1].
            travel: :class:`ddim_fast.diffusion.restoration.TimeTravel`, for operators that see little.
            codec: for a network of latents, what makes images of them; :class:`ddim_fast.diffusion.latent.LatentSampler` gives
                its own, and returns images.

        Returns:
            (N, C, H, W) float32 on the network's device, images or latents. Without noise, ``operator`` of the images is the
            measurement, to rounding.

        Raises:
            ValueError: the measurement does not fit the operator, the seeds or the network.
        """
        operator = operator.to(self.device)
        measurement = as_tensor(measurement).to(self.device, torch.float32)
        if len(measurement) != len(seeds := check_seeds(seeds)):
            raise ValueError(f"{len(seeds)} seeds do not fit {len(measurement)} measurements")
        timesteps, table = self.restoration_steps(operator, eta=eta, noise_std=noise_std, travel=travel)
        seen = operator.pseudo_inverse(measurement)
        if codec is None and tuple(seen.shape[1:]) != self.image_shape:
            shape = tuple(seen.shape[1:])
            raise ValueError(f"the measurement is of images of shape {shape}, but the network's are {self.image_shape}")
        request = TensorRequest.check(self, seeds, None, labels, guidance)
        run = self._run(request, timesteps, table)
        engine = self._restoring(operator, codec, tuple(seen.shape[1:]))
        x = engine.one_step.update.pack(run.x, seen)
        return engine.last(dataclasses.replace(run, x=x, seeds=request.seeds))

    def restoration_steps(
        self, operator: LinearOperator, *, eta: float = 0.85, noise_std: float = 0.0, travel: TimeTravel | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps at which :meth:`restore` evaluates the network, and its coefficients; arguments and errors as there,
        see :func:`ddim_fast.diffusion.restoration.restoration`."""
        if self.tolerance is not None:
            raise ValueError("restoring takes fixed steps, and with a tolerance each image takes its own; name steps instead")
        return restoration(
            self.timesteps,
            self._levels,
            self.config.prediction_type,
            operator,
            eta=eta,
            noise_std=noise_std,
            travel=travel,
        )

    def _restoring(self, operator: LinearOperator, codec: Codec | None, seen_shape: tuple[int, int, int]) -> Engine:
        """The engine of restorations, kept for more measurements by the same operator: it may have compiled the step."""
        engine = self._last_restoring
        update = None if engine is None else engine.one_step.update
        if update is None or (update.operator, update.codec, update.seen_shape) != (operator, codec, seen_shape):
            update = Restoration(operator, self.image_shape, seen_shape, self.solver.clip, codec)
            engine = self._last_restoring = self._engine_of(update)
        return engine

    def _in_batches(self, request: TensorRequest, batch_size: int, compute: Callable[[TensorRequest], Tensor]) -> Tensor:
        """What ``compute`` makes of a request, ``batch_size`` images at a time."""
        batch_size = check_batch_size(batch_size)
        images = [torch.empty(0, *self.config.image_shape, dtype=torch.float32, device=self.device)]
        for start in range(0, len(request), batch_size):
            batch = request[start : start + batch_size]
            full = min(batch_size, len(request))
            padded = batch.padded(full) if self._engine.one_size else batch
            images.append(compute(padded)[: len(batch)])
        return torch.cat(images)

    def _encode_exactly(self, request: TensorRequest) -> Tensor:
        if not isinstance(self.solver, DDIM) or self.solver.clip is not None or self.reuse > 1:
            raise ValueError("encode(exact=True) inverts steps of the ddim solver, without clipping and with reuse=1")
        run = self._run(request, self.timesteps, self.solver.table)
        x = run.x
        for number, coefficients in reversed(list(enumerate(self.solver.coefficients))):
            at, index = run.at(number), run.steps[number]
            x = inverse_step(lambda x, at=at, index=index: self._engine.step((x,), at, index, None)[0][0], coefficients, x)
        return x

    @inference()
    def _sample_for_calibration(self) -> None:
        """A few images of all classes and of none, from seeds that nobody asks for."""
        classes = self.config.num_classes
        seeds = [2**62 + i for i in range(8)]
        labels = None if classes is None else torch.tensor([i * classes // 7 for i in range(8)], device=self.device)
        request = TensorRequest(torch.tensor(seeds, device=self.device), None, labels, None)
        make_engine("eager", OneStep(self._network, self.solver)).last(self._run(request, self.timesteps, self.solver.table))

    @inference()
    def _sample_controlled(self, request: TensorRequest, counts: list[Tensor]) -> Tensor:
        """The images; how often the network was evaluated for each is added to ``counts``."""
        index = torch.zeros((), dtype=torch.int64, device=self.device)
        guidance, interval = request.guidance, request.guidance_interval
        both = guidance is not None and self.guide is None

        def evaluate(x: Tensor, timesteps: Tensor, which: Tensor) -> Tensor:
            labels = None if request.labels is None else request.labels[which]
            conditions = self._network.conditions_each(timesteps, labels, both)
            if guidance is None:
                return self._network(x, conditions, index)
            if both:
                unconditional, conditional = self._network(torch.cat([x, x]), conditions, index).chunk(2)
            else:
                conditional = self._network(x, conditions, index)
                unconditional = self._guide(x, self._guide.conditions_each(timesteps, labels, False), index)
            scale = torch.where(guided_steps(timesteps, guidance, interval), guidance, 1.0).to(x.dtype)
            return torch.lerp(unconditional, conditional, scale[:, None, None, None])

        x, prediction_type = self._initial(request), self.config.prediction_type
        images, evaluations = solve_controlled(evaluate, x, self.schedule, prediction_type, self.tolerance, self._clip)
        counts.append(evaluations.cpu() * (2 if both else 1))
        return images

    def _initial(self, request: TensorRequest) -> Tensor:
        if request.x_T is not None:
            return request.x_T
        return seeded_noise(request.seeds, INITIAL_NOISE, self.config.image_shape, self.device)

    @inference()
    def _sample(self, request: TensorRequest, on_step: Callable[[SamplerState], None] | None) -> Tensor:
        if on_step is None:
            return self._engine.last(self._run(request, self.timesteps, self.solver.table))
        for state in self._trajectory(request):
            on_step(state)
        return state.x

    @inference()
    def _trajectory(self, request: TensorRequest) -> Iterator[SamplerState]:
        run = self._run(request, self.timesteps, self.solver.table)
        before = run.x
        for i, (state, output) in enumerate(self._engine.trajectory(run)):
            yield SamplerState(i, int(self.timesteps[i]), state[0], (self.solver, before, output))
            before = state[0]

    def _run(self, request: TensorRequest, timesteps: np.ndarray, table: np.ndarray) -> Run:
        """All that can be done before the first step."""
        device, guidance = self.device, request.guidance
        on_device = torch.from_numpy(np.ascontiguousarray(timesteps)).to(device)
        guided = guided_steps(timesteps, guidance, request.guidance_interval)
        labels, by_guide = request.labels, guidance is not None and self.guide is not None
        return Run(
            x=self._initial(request),
            conditions=self._network.conditions(on_device, labels, guided=guidance is not None and not by_guide),
            table=torch.from_numpy(table).to(device),
            steps=torch.arange(len(timesteps), device=device),
            seeds=request.seeds if self.solver.stochastic else None,
            guidance=None if guidance is None else torch.tensor(guidance, dtype=torch.float32, device=device),
            guide_conditions=self._guide.conditions(on_device, labels, guided=False) if by_guide else (),
            correction=None if request.gradient is None else self._classifier_guidance(request.gradient, on_device),
            unguided=frozenset(() if guidance is None else np.flatnonzero(~guided).tolist()),
        )

    def _classifier_guidance(self, gradient: Gradient, timesteps: Tensor) -> ClassifierGuidance:
        """For runs of :meth:`sample`."""
        return ClassifierGuidance(gradient, timesteps, self._levels[:-1], self.config.prediction_type, self.solver.clip)


class _OfThread(threading.local):
    """What a thread's last calls leave behind."""

    def __init__(self) -> None:
        self.evaluations: WeakKeyDictionary[Sampler, Tensor] = WeakKeyDictionary()


_of_thread = _OfThread()

_NO_STEPS = "with a tolerance each image takes steps of its own, so there are no common states to look at; name steps instead"


def _check_tolerance(tolerance: float, eta: float | str, solver: str, engine: str, reuse: int) -> None:
    if not is_finite(tolerance) or tolerance <= 0:
        raise ValueError(f"tolerance must be a positive number; got {tolerance!r}")
    if engine not in ("auto", "eager"):
        raise ValueError(
            f"the {engine} engine prepares a run of fixed steps, and with a tolerance each image takes steps of its own; "
            "use engine eager, or fixed steps"
        )
    if reuse != 1:
        raise ValueError(f"reuse={reuse} needs fixed steps; with a tolerance each image takes steps of its own")
    if eta != 0 or solver != "ddim":
        raise ValueError(
            f"a tolerance controls a deterministic solver of its own: eta must be 0 and solver ddim; got {eta}, {solver}"
        )
