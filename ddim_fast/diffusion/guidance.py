"""Classifier-free, auto- and classifier guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ..models.config import UNetConfig
from ..ops.scalars import is_finite, is_whole, plain
from .prediction import prediction_coefficients
from .schedule import NoiseSchedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor


__all__ = [
    "ClassifierGuidance",
    "Gradient",
    "Scale",
    "apply_guidance",
    "check_guidance",
    "check_guide",
    "check_interval",
    "guided_steps",
    "likelihood_gradient",
]

# The function of classifier guidance (Dhariwal and Nichol 2021): (x_t, timestep, x_0) -> the gradient of log p(condition | x_t)
# with respect to x_t, its scale included. x_t is a batch of (n, C, H, W) float32, timestep a () int64 tensor on its device, and
# x_0 the network's prediction there. It is called in each step, with gradients enabled, and is not compiled.
Gradient: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"

# Torch's or numpy's.
Array: TypeAlias = Any

# Of guidance: one for all steps, or one for each.
Scale: TypeAlias = "float | tuple[float, ...]"


class OnDevice(Protocol):
    """A sampler or a denoiser: its noise schedule and its device."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def device(self) -> torch.device: ...


def apply_guidance(unconditional: Any, conditional: Any, scale: Any) -> Any:
    """The guided prediction, unconditional + scale (conditional - unconditional).

    Classifier-free guidance (Ho and Salimans 2022, eq. 6) takes both from one network, with the label and without it;
    autoguidance (Karras et al. 2024) takes ``unconditional`` from a worse network. Any prediction linear in x_0 can be guided.

    It is one pass over memory of its own: it reads two outputs and writes one. :func:`ddim_fast.fast_ddim_step` joins it to a
    DDIM step, for other loops. Here it is apart, so that all solvers have guidance, and those with memory, classifier guidance
    and :class:`ddim_fast.diffusion.trajectory.SamplerState` have the guided output.

    Args:
        unconditional, conditional: tensors, arrays or values of a graph.
        scale: a number of the same kind.
    """
    if hasattr(unconditional, "lerp"):  # a tensor, whose lerp is one pass over memory
        return unconditional.lerp(conditional, scale)
    return unconditional + scale * (conditional - unconditional)


def check_guidance(guidance: Any, labels: Any, with_guide: bool = False) -> Scale | None:
    """The guidance scale, or the scales of the steps; None if they change nothing.

    Args:
        guidance: a number, or a list or an array of them; or None.
        with_guide: guidance is away from another network, not towards a label.

    Raises:
        ValueError: they are not finite numbers, or there are no labels to guide towards.
    """
    guidance = plain(guidance)
    listed = (isinstance(guidance, Sequence) and not isinstance(guidance, str)) or hasattr(guidance, "tolist")
    scales = [plain(scale) for scale in guidance] if listed else [1 if guidance is None else guidance]
    if not all(map(is_finite, scales)):
        raise ValueError(f"guidance must be a finite number, or one for each step; got {guidance!r}")
    if all(scale == 1 for scale in scales):
        return None
    if labels is None and not with_guide:
        raise ValueError(f"guidance {guidance} needs class labels to guide towards")
    return tuple(map(float, scales)) if listed else float(scales[0])


def check_guide(config: UNetConfig, guide: UNetConfig) -> None:
    """Check that a guide matches a network.

    Args:
        config, guide: the configurations of the network and of its guide.

    Raises:
        ValueError: their images, noise schedules or classes differ; the message names the difference.
    """
    for name in ("image_shape", "prediction_type", "num_classes"):
        own, other = getattr(config, name), getattr(guide, name)
        if own != other and (name, other) != ("num_classes", None):
            raise ValueError(f"the guide must be of the same kind as the network: its {name} is {other}, not {own}")
    schedule, its_schedule = NoiseSchedule.from_config(config), NoiseSchedule.from_config(guide)
    if not np.array_equal(schedule.alphas_cumprod, its_schedule.alphas_cumprod):
        raise ValueError("the guide must be of the same kind as the network: its noise schedule differs")


def check_interval(interval: Sequence[int] | None, guidance: Any, num_train_timesteps: int) -> tuple[int, int] | None:
    """The guidance interval.

    Raises:
        ValueError: it is not two timesteps in rising order, or there is no guidance, or a scale for each step.
    """
    if interval is None:
        return None
    numbers = [plain(t) for t in interval] if isinstance(interval, Sequence) or hasattr(interval, "tolist") else []
    if len(numbers) != 2 or not all(map(is_whole, numbers)) or not 0 <= numbers[0] <= numbers[1] < num_train_timesteps:
        raise ValueError(
            f"guidance_interval must be two timesteps, the lower one first, from 0 to {num_train_timesteps - 1}; got "
            f"{interval!r}"
        )
    if guidance is None:
        raise ValueError("guidance_interval limits guidance; give its scale, guidance, as well")
    if not isinstance(plain(guidance), (int, float)):
        raise ValueError("guidance_interval limits a single scale; in a list of scales, 1 leaves a step out")
    return numbers[0], numbers[1]


def guided_steps(timesteps: Array, guidance: float | Sequence[float] | None, interval: tuple[int, int] | None) -> Array:
    """(S,) bool: whether each step is guided, which takes two evaluations instead of one.

    Args:
        timesteps: (S,) timesteps of the run, an array or a tensor.
        guidance: the scale, or S of them; None or 1 for none.
        interval: the first and last guided timestep, both included; None for all.
    """
    low, high = (-math.inf, math.inf) if interval is None else interval
    guides = np.array(guidance) != 1 if isinstance(guidance, Sequence) else guidance not in (None, 1)
    return guides & (timesteps >= low) & (timesteps <= high)


def likelihood_gradient(log_likelihood: Callable[[Tensor], Tensor], sampler: OnDevice) -> Gradient:
    """The gradient of classifier guidance for a condition on the image itself, such as its brightness or a classifier of clean
    images.

    log p(condition | x_t) is approximated by log p(condition | x_0) of the network's x_0 at x_t. d x_0 / d x_t is approximated
    by sqrt(alphas_cumprod), its value for data of unit variance in each pixel. So the network is not differentiated, and the
    predicted x_0 moves by (1 - alphas_cumprod) times the gradient: far at high noise, and not at all at the end. (With epsilon
    held constant, the derivative would be 1 / sqrt(alphas_cumprod), which is unbounded in the first steps.)

    Args:
        log_likelihood: (N, C, H, W) images in [-1, 1] -> (N,) log p(condition | image), its scale included; differentiable.
        sampler: the sampler that is guided.

    Returns:
        The ``gradient`` for :meth:`ddim_fast.Sampler.sample`.
    """
    import torch

    signal = torch.tensor(np.sqrt(sampler.schedule.alphas_cumprod), dtype=torch.float32, device=sampler.device)

    def gradient(x: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        x0 = x0.requires_grad_()
        return signal.index_select(0, timestep.reshape(1)) * torch.autograd.grad(log_likelihood(x0).sum(), x0)[0]

    return gradient


class ClassifierGuidance:
    """Move the network's output so that its epsilon becomes epsilon - sqrt(1 - alphas_cumprod) gradient (Dhariwal and Nichol
    2021, algorithm 2 and eq. 14).

    Args:
        gradient: see :meth:`ddim_fast.Sampler.sample`.
        timesteps: (S,) int64 timesteps of the run, on its device.
        alphas_cumprod: (S,) float64, their noise levels.
        prediction_type: the network's prediction type.
        clip: clip the x_0 for ``gradient`` to [-r, r]; None does not.
    """

    def __init__(
        self, gradient: Gradient, timesteps: Tensor, alphas_cumprod: np.ndarray, prediction_type: str, clip: float | None
    ) -> None:
        import torch  # not above: programs without torch check requests here

        self._gradient, self._timesteps, self._clip = gradient, timesteps, clip
        rows = []
        for level in map(float, alphas_cumprod):
            from_sample, from_output, _, eps_from_output = prediction_coefficients(level, prediction_type)
            # Without signal, x_t does not depend on the condition: the gradient is zero, and the output cannot express another
            # epsilon.
            shift = -math.sqrt(1 - level) / eps_from_output if level > 0 else 0.0
            rows.append((from_sample, from_output, shift))
        self._table = torch.tensor(rows, dtype=torch.float32, device=timesteps.device)

    def __call__(self, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """The corrected output of step ``index``, () int64 on the device of x; all (N, C, H, W) float32.

        Raises:
            ValueError: the gradient is not like x.
        """
        import torch

        from_sample, from_output, shift = self._table.index_select(0, index.reshape(1))[0].unbind()
        x0 = from_sample * x + from_output * output
        if self._clip is not None:
            x0 = x0.clamp(-self._clip, self._clip)
        with torch.enable_grad():
            gradient = self._gradient(x.detach(), self._timesteps.index_select(0, index.reshape(1))[0], x0)
        if not isinstance(gradient, torch.Tensor) or gradient.shape != x.shape:
            got = tuple(gradient.shape) if isinstance(gradient, torch.Tensor) else type(gradient).__name__
            raise ValueError(f"gradient must return a tensor like x_t, of shape {tuple(x.shape)}; got {got}")
        return output + shift * gradient.detach().to(output.dtype)
