"""Faster DDIM schedulers for diffusers' pipelines, with the same images.

>>> from diffusers import DDIMPipeline
>>> from ddim_fast.interop.diffusers import FastDDIMScheduler
>>> pipe = DDIMPipeline.from_pretrained(folder)
>>> pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config)
>>> images = pipe(batch_size=2, num_inference_steps=10).images

With exact steps to the next timestep of the run, and spacings that diffusers lacks:

>>> pipe.scheduler = FastDDIMScheduler.from_config(pipe.scheduler.config, compat="exact", timestep_spacing="quadratic")
>>> images = pipe(batch_size=2, num_inference_steps=10).images

A pipeline is saved with its scheduler. It loads with it once this module has been imported: diffusers does not import modules
that a file names. ``DDIMPipeline`` turns any scheduler into a plain DDIMScheduler, so set it again after loading.
"""

from __future__ import annotations

import operator
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..diffusion.prediction import PredictionCoefficients, linear_prediction
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.timesteps import SPACINGS, select_timesteps
from ..ops.ddim_step import ddim_step
from .step_coefficients import StepCoefficients, between, why_not_finite

try:
    from diffusers import DDIMInverseScheduler, DDIMScheduler
except ModuleNotFoundError as error:
    raise ImportError(
        f"ddim_fast.interop.diffusers needs diffusers, which is not there ({error}): pip install diffusers"
    ) from error

# A loading pipeline looks for SchedulerMixin in the module of the class, to learn its kind.
from diffusers import SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as DDIMInverseSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["FastDDIMInverseScheduler", "FastDDIMScheduler"]

_COMPATS = ("diffusers", "exact")
_DIFFUSERS_SPACINGS = ("leading", "trailing", "linspace")


class _FastScheduler(SchedulerMixin):  # type: ignore[misc]  # diffusers' classes are not checked
    """The common part of the two schedulers. Coefficients are computed once, on the host, and a step makes fewer passes over
    the images than diffusers'.

    Attributes:
        replaces: the scheduler that :func:`ddim_fast.accelerate` replaced by this one.
        _direction: 1 where the timesteps rise, -1 where they fall.
        _device_timesteps: the tensor that set_timesteps made, on its device.
        _timestep_values: its values.
        _rising: with compat="exact", the same from the least noise to the most.
        _levels: alphas_cumprod on the host.
        _coefficient_cache: the coefficients computed so far.
        _has_warned: whether a warning has said that diffusers' coefficients are not finite.
    """

    replaces: Any = None
    _direction: int
    _device_timesteps: Tensor | None = None
    _timestep_values: Sequence[int] = ()
    _rising: Sequence[int] = ()
    _levels: Tensor
    _coefficient_cache: dict[tuple[Any, ...], StepCoefficients]
    _has_warned = False

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32: the share of the signal's variance at each timestep. ``add_noise`` moves it to the samples' device. To
        change it, assign a new tensor: ``step`` may not notice writes into it."""
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Tensor) -> None:
        if value is self.__dict__.get("_alphas_cumprod"):
            return
        self._alphas_cumprod = value
        self._levels = value.cpu()
        self._coefficient_cache = {}

    def _checked_options(self) -> dict[str, Any]:
        """The options of diffusers' class, without ``compat``, which is checked here."""
        options = {name: value for name, value in self.config.items() if not name.startswith("_")}
        compat = options.pop("compat")
        if compat not in _COMPATS:
            raise ValueError(f"compat must be {' or '.join(map(repr, _COMPATS))}; got {compat!r}")
        return options

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """Save the config as diffusers does; after ``accelerate``, the replaced scheduler's, so that the folder loads without
        this package."""
        saved: Any = super() if self.replaces is None else self.replaces
        saved.save_config(*args, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of a run; call it before the run.

        Args:
            num_inference_steps: S.
            device: the device of ``self.timesteps``. ``step`` identifies its elements by their place and never waits for the
                device.
            timesteps: instead of S, the timesteps themselves, distinct; only with ``compat="exact"``.

        Raises:
            ValueError: S is out of range, the spacing is unknown, or ``compat`` does not allow it.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(f"give num_inference_steps or timesteps, one of them; got {num_inference_steps} and {timesteps}")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}")
        if self.config.compat == "exact":
            self._rising = self._select(num_inference_steps, timesteps)
            self.num_inference_steps = len(self._rising)
            self.timesteps = torch.tensor(self._rising[:: self._direction])
        else:
            self._check_spacing(timesteps)
            super().set_timesteps(num_inference_steps)
        self._timestep_values = self.timesteps.tolist()
        self.timesteps = self._device_timesteps = self.timesteps.to(device)

    def _select(self, steps: int | None, timesteps: Sequence[int] | None) -> list[int]:
        """The timesteps of compat="exact", rising."""
        spacing = self.config.timestep_spacing if timesteps is None else timesteps
        chosen = select_timesteps(NoiseSchedule.from_betas(self.betas), steps, spacing)
        if not np.issubdtype(chosen.dtype, np.integer):
            raise ValueError(
                f"timestep_spacing {spacing!r} lies between the training timesteps, which a DDIMScheduler has; use log-snr"
            )
        if timesteps is None and spacing == "leading":
            chosen += self.config.steps_offset
            if chosen[0] >= len(self.betas):
                raise ValueError(
                    f"steps_offset = {self.config.steps_offset} moves the timestep {chosen[0]} beyond the last one, "
                    f"{len(self.betas) - 1}; take fewer than {steps} steps, or another timestep_spacing"
                )
        # A repeated timestep would be a step to itself, which changes nothing.
        return np.unique(chosen).tolist()

    def _check_spacing(self, timesteps: Sequence[int] | None) -> None:
        """Raise a ValueError for timesteps that compat="diffusers" would step through wrongly."""
        spacing = self.config.timestep_spacing
        if timesteps is not None:
            request = "timesteps of one's own"
        elif spacing in SPACINGS and spacing not in _DIFFUSERS_SPACINGS:
            request = f"timestep_spacing = {spacing!r}"
        else:
            return
        raise ValueError(
            f"{request} needs compat='exact': compat='diffusers' assumes that every step is num_train_timesteps // "
            "num_inference_steps long"
        )

    def _value(self, timestep: int | Tensor) -> int:
        """The value of a timestep. An element of ``self.timesteps`` on a GPU is identified by its address, because reading it
        would wait for the GPU."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and self._is_element(timestep):
            return self._timestep_values[int(timestep.storage_offset())]
        return operator.index(timestep)

    def _is_element(self, timestep: Tensor) -> bool:
        made = self._device_timesteps
        return (
            made is not None
            and timestep.numel() == 1
            and (timestep.device, timestep.dtype) == (made.device, made.dtype)
            and timestep.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
        )

    def _below(self, timestep: int) -> int:
        """The timestep at the less noisy end of a step; negative after the last one."""
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        if self.config.compat == "diffusers":
            return timestep - self.config.num_train_timesteps // self.num_inference_steps
        place = bisect_left(self._rising, timestep)
        return self._rising[place - 1] if place else -1

    def _check_finite(self, reason: str | None) -> None:
        """If a step is not finite for a known reason: an error with compat="exact", otherwise one warning."""
        if reason is None:
            return
        if self.config.compat == "exact":
            raise ValueError(reason)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"this step is NaN or infinite, as in diffusers: {reason}", stacklevel=4)

    def _move(
        self,
        output: Tensor,
        sample: Tensor,
        c: StepCoefficients,
        *,
        thresholding: bool = False,
        use_clipped_model_output: bool | None = False,
    ) -> tuple[Tensor, Tensor]:
        """The sample after a step without its fresh noise, and the predicted x_0 (Song et al. 2021, eq. 12), by diffusers'
        operations in diffusers' order."""
        clip = self.config.clip_sample_range if self.config.clip_sample else None
        kind = self.config.prediction_type
        dtype = torch.promote_types(sample.dtype, output.dtype)
        self._check_finite(why_not_finite(c, kind, use_clipped_model_output))
        multiples = None if thresholding or use_clipped_model_output else _in_one_pass(kind, c, dtype)
        if multiples is not None and sample.shape == output.shape:
            moved = ddim_step(sample, output, (*multiples, c.to_signal, c.to_noise, 0.0), clip, out_dtype=dtype)
            return moved, ddim_step(sample, output, (*multiples, 1.0, 0.0, 0.0), clip, out_dtype=dtype)
        x0, eps = _x0_and_epsilon(kind, output, sample, c)
        if thresholding:
            x0 = self._threshold_sample(x0)
        elif clip is not None:
            x0 = x0.clamp(-clip, clip) if x0 is output else x0.clamp_(-clip, clip)
        if use_clipped_model_output:
            eps = _noise_beside(x0, sample, c)
        return _add(x0 * c.to_signal, eps * c.to_noise), x0


class FastDDIMScheduler(_FastScheduler, DDIMScheduler):  # type: ignore[misc]
    """diffusers' DDIMScheduler (Song et al. 2021), with a faster ``step`` that does not wait for a GPU.

    Options and methods are those of ``diffusers.DDIMScheduler``, with one option more. In float32 on a CPU every option gives
    the same bits for finite input. In bfloat16 and float16 the result has diffusers' dtype and a smaller error, because it is
    computed in float32. (With thresholding or ``use_clipped_model_output`` every operation rounds, but no coefficient does.)
    Noise is drawn from the same generators in the same order.

    ``step`` keeps no state, so timesteps may come in any order. On a GPU, elements of ``timesteps`` and of its slices are
    identified by their place, without reading them (do not overwrite them). Any other tensor on a GPU is read, which waits for
    the GPU as diffusers' own step does.

    Args:
        compat: ``diffusers`` takes the next timestep to be ``num_train_timesteps // num_inference_steps`` below, as diffusers
            does. That is wrong for nearly every run with ``linspace``, and with ``trailing`` where S does not divide T; there
            diffusers sometimes adds a timestep -1 (T = 1000, S = 61).
            ``exact`` takes the next timestep of the run, and allows ``set_timesteps(timesteps=[...])`` and any of
            :data:`ddim_fast.diffusion.timesteps.SPACINGS` as ``timestep_spacing``. For a timestep outside the run, the next one
            is the largest smaller one.

            Where diffusers' arithmetic is NaN or infinite (with eta = 1 at many numbers of steps of the cosine and zero-SNR
            schedules; with epsilon at zero SNR), so is ``diffusers``, with one warning. ``exact`` is right, or raises an error
            where the prediction does not determine the step.

    Raises:
        ValueError: ``compat`` is neither.
    """

    _direction = -1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
    ) -> None:
        super().__init__(**self._checked_options())

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step, from ``timestep`` to the next one.

        Args:
            model_output: the network's prediction, of type ``prediction_type``.
            timestep: the timestep of ``sample``; a number, or a tensor of one.
            sample: x_t.
            eta: 0 is DDIM, 1 has the variance of DDPM.
            use_clipped_model_output: take epsilon from the clipped x_0 instead of the prediction.
            generator: for the noise where eta > 0: one, or a list with one per image.
            variance_noise: that noise itself, instead.
            return_dict: a DDIMSchedulerOutput instead of a tuple.

        Returns:
            ``prev_sample`` and ``pred_original_sample``.

        Raises:
            ValueError: ``set_timesteps`` has not been called, ``prediction_type`` is unknown, there is a generator beside
                ``variance_noise``; or with ``compat="exact"``, eta is out of range or the step is not determined.
        """
        c = self._coefficients(self._value(timestep), float(eta))
        prev_sample, x0 = self._move(
            model_output,
            sample,
            c,
            thresholding=self.config.thresholding,
            use_clipped_model_output=use_clipped_model_output,
        )
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            elif generator is not None:
                raise ValueError(
                    "Cannot pass both generator and variance_noise. Please make sure that either `generator` or"
                    " `variance_noise` stays `None`."
                )
            prev_sample = _add(prev_sample, variance_noise * c.sigma)
        return DDIMSchedulerOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _coefficients(self, timestep: int, eta: float) -> StepCoefficients:
        below = self._below(timestep)
        key = (timestep, below, eta, self.final_alpha_cumprod)
        c = self._coefficient_cache.get(key)
        if c is None:
            start, end = self._levels[timestep], self._levels[below] if below >= 0 else self.final_alpha_cumprod
            variance = (1 - end) / (1 - start) * (1 - start / end)
            c = self._coefficient_cache[key] = between(
                start, end, eta, eta * variance**0.5, exact=self.config.compat == "exact"
            )
        return c


class FastDDIMInverseScheduler(_FastScheduler, DDIMInverseScheduler):  # type: ignore[misc]
    """diffusers' DDIMInverseScheduler, from image to noise, with the changes of :class:`FastDDIMScheduler`.

    Args:
        compat: as there; with ``exact``, a step starts from the previous timestep of the run.
    """

    # Schedulers whose configs it takes; otherwise diffusers warns of DDIMScheduler's options that inversion lacks.
    _compatibles: ClassVar[list[str]] = ["DDIMInverseScheduler", "DDIMScheduler"]
    _direction = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        compat: str = "diffusers",
        **kwargs: Any,
    ) -> None:
        super().__init__(**self._checked_options(), **kwargs)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMInverseSchedulerOutput | tuple[Tensor, Tensor]:
        """One step towards noise, to ``timestep``. Arguments, results and errors as :meth:`FastDDIMScheduler.step`."""
        moved, x0 = self._move(model_output, sample, self._coefficients(self._value(timestep)))
        return DDIMInverseSchedulerOutput(moved, x0) if return_dict else (moved, x0)

    def _coefficients(self, timestep: int) -> StepCoefficients:
        below = self._below(timestep)
        key = (timestep, below, self.initial_alpha_cumprod)
        c = self._coefficient_cache.get(key)
        if c is None:
            start = self._levels[below] if below >= 0 else self.initial_alpha_cumprod
            c = self._coefficient_cache[key] = between(start, self._levels[timestep], exact=self.config.compat == "exact")
        return c


def _in_one_pass(prediction_type: str, c: StepCoefficients, dtype: torch.dtype) -> PredictionCoefficients | None:
    """The coefficients of :func:`ddim_step` for each result in one pass; None if the result would be neither diffusers' bits
    nor, in a narrow dtype, better ones."""
    divisor = {"epsilon": c.signal, "sample": c.noise}.get(prediction_type)
    if prediction_type == "v_prediction" or (divisor and dtype in (torch.bfloat16, torch.float16)):
        return linear_prediction(prediction_type, c.signal, c.noise)
    return None


def _x0_and_epsilon(prediction_type: str, output: Tensor, sample: Tensor, c: StepCoefficients) -> tuple[Tensor, Tensor]:
    """:func:`ddim_fast.diffusion.prediction.x0_and_epsilon` with half the memory traffic, which decides a step's time: half the
    time in a batch of 256. One of the results may be ``output`` itself; the other is new."""
    if prediction_type == "epsilon":
        return _add(sample, output * -c.noise).div_(c.signal), output
    if prediction_type == "sample":
        return output, _noise_beside(output, sample, c)
    if prediction_type == "v_prediction":
        return _add(sample * c.signal, output * -c.noise), _add(output * c.signal, sample * c.noise)
    raise ValueError(f"prediction_type given as {prediction_type} must be one of `epsilon`, `sample`, or `v_prediction`")


def _noise_beside(x0: Tensor, sample: Tensor, c: StepCoefficients) -> Tensor:
    """The epsilon between ``x0`` and ``sample``."""
    return _add(sample, x0 * -c.signal).div_(c.noise)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """a + b, in the memory of the temporary ``b`` if shape, layout and dtype allow it: new memory costs the most."""
    fits = a.shape == b.shape and a.stride() == b.stride() and torch.promote_types(a.dtype, b.dtype) == b.dtype
    return b.add_(a) if fits else a + b
