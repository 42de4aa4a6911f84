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
    "apply_guidance",
    "check_guidance",
    "check_guide",
    "check_interval",
    "guided_steps",
    "likelihood_gradient",
]

# Of classifier guidance (Dhariwal and Nichol 2021): (x_t, timestep, x_0) -> the gradient of log p(condition | x_t) with respect
# to x_t, its scale included. x_t is a batch of (n, C, H, W) float32, timestep a () int64 tensor beside it, and x_0 the
# network's prediction there. It is called in each step, with gradients enabled, and is not compiled.
Gradient: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"

# Torch's or numpy's.
Array: TypeAlias = Any


class OnDevice(Protocol):
    """A sampler or a denoiser: its noise schedule, and where it computes."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def device(self) -> torch.device: ...


def apply_guidance(unconditional: Any, conditional: Any, scale: Any) -> Any:
    """The guided prediction, unconditional + scale (conditional - unconditional).

    Classifier-free guidance (Ho and Salimans 2022, eq. 6) takes both from one network, with the label and without it;
    autoguidance (Karras et al. 2024) takes ``unconditional`` from a worse network. Any prediction linear in x_0 can be guided.

    Args:
        unconditional, conditional: tensors, arrays or values of a graph.
        scale: a number of the same kind.
    """
    if hasattr(unconditional, "lerp"):  # a tensor, whose lerp is one pass over memory
        return unconditional.lerp(conditional, scale)
    return unconditional + scale * (conditional - unconditional)


def check_guidance(guidance: float | None, labels: Any, with_guide: bool = False) -> float | None:
    """The guidance scale, None where it changes nothing.

    Args:
        with_guide: guidance is away from another network, not towards a label.

    Raises:
        ValueError: it is not a finite number, or there are no labels to guide towards.
    """
    guidance = plain(guidance)
    if guidance is None or (is_finite(guidance) and guidance == 1):
        return None
    if not is_finite(guidance):
        raise ValueError(f"guidance must be a finite number; got {guidance!r}")
    if labels is None and not with_guide:
        raise ValueError(f"guidance {guidance} needs class labels to guide towards")
    return float(guidance)


def check_guide(config: UNetConfig, guide: UNetConfig) -> None:
    """Whether a network can be led away from another one.

    Args:
        config, guide: of the network and of its guide.

    Raises:
        ValueError: they are not of the same images, noise and classes; the message names what differs.
    """
    for name in ("image_shape", "prediction_type", "num_classes"):
        own, other = getattr(config, name), getattr(guide, name)
        if own != other and (name, other) != ("num_classes", None):
            raise ValueError(f"the guide must be of the same kind as the network: its {name} is {other}, not {own}")
    schedule, its_schedule = NoiseSchedule.from_config(config), NoiseSchedule.from_config(guide)
    if not np.array_equal(schedule.alphas_cumprod, its_schedule.alphas_cumprod):
        raise ValueError("the guide must be of the same kind as the network: its noise schedule is another one")


def check_interval(interval: Sequence[int] | None, guidance: float | None, num_train_timesteps: int) -> tuple[int, int] | None:
    """The guidance interval.

    Raises:
        ValueError: it is not two timesteps in rising order, or there is no guidance to limit.
    """
    if interval is None:
        return None
    numbers = [plain(t) for t in interval] if isinstance(interval, Sequence) or hasattr(interval, "tolist") else []
    if len(numbers) != 2 or not all(map(is_whole, numbers)) or not 0 <= numbers[0] <= numbers[1] < num_train_timesteps:
        raise ValueError(
            f"guidance_interval is two timesteps, the lower one first, from 0 to {num_train_timesteps - 1}; got {interval!r}"
        )
    if guidance is None:
        raise ValueError("guidance_interval limits guidance; give its scale, guidance, as well")
    return numbers[0], numbers[1]


def guided_steps(timesteps: Array, guidance: float | None, interval: tuple[int, int] | None) -> Array:
    """Which steps are guided, each by two evaluations instead of one: (S,) bool.

    Args:
        timesteps: (S,) of the run, an array or a tensor.
        guidance: the scale; None or 1 for none.
        interval: the timesteps that it is limited to, both included; None for all.
    """
    low, high = (-math.inf, math.inf) if interval is None else interval
    return (guidance not in (None, 1)) & (timesteps >= low) & (timesteps <= high)


def likelihood_gradient(log_likelihood: Callable[[Tensor], Tensor], sampler: OnDevice) -> Gradient:
    """The gradient of classifier guidance for a condition on the image itself, such as its brightness, or what a classifier of
    clean images says.

    log p(condition | x_t) is taken to be log p(condition | x_0) of the x_0 that the network predicts at x_t, and x_0 to change
    with x_t as it does for data of unit variance in each pixel, by d x_0 / d x_t = sqrt(alphas_cumprod). So the network itself
    is not differentiated, and the predicted x_0 moves by (1 - alphas_cumprod) times the gradient there: much where nothing is
    decided yet, and nothing at the end. (With epsilon held constant it would be 1 / sqrt(alphas_cumprod), which grows beyond
    all bounds in the first steps.)

    Args:
        log_likelihood: (N, C, H, W) images in [-1, 1] -> (N,) log p(condition | image), its scale included; differentiable.
        sampler: the sampler that is guided.

    Returns:
        What :meth:`ddim_fast.Sampler.sample` takes as ``gradient``.
    """
    import torch

    signal = torch.tensor(np.sqrt(sampler.schedule.alphas_cumprod), dtype=torch.float32, device=sampler.device)

    def gradient(x: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
        x0 = x0.requires_grad_()
        return signal.index_select(0, timestep.reshape(1)) * torch.autograd.grad(log_likelihood(x0).sum(), x0)[0]

    return gradient


class ClassifierGuidance:
    """Moves the network's output so that its epsilon becomes epsilon - sqrt(1 - alphas_cumprod) gradient (Dhariwal and Nichol
    2021, algorithm 2 and eq. 14).

    Args:
        gradient: see :meth:`ddim_fast.Sampler.sample`.
        timesteps: (S,) int64 of the run, on its device.
        alphas_cumprod: (S,) float64, their noise levels.
        prediction_type: what the network predicts.
        clip: the x_0 that ``gradient`` is given is clipped to [-r, r]; None does not.
    """

    def __init__(
        self, gradient: Gradient, timesteps: Tensor, alphas_cumprod: np.ndarray, prediction_type: str, clip: float | None
    ) -> None:
        import torch  # not above: what checks requests serves programs without torch

        self._gradient, self._timesteps, self._clip = gradient, timesteps, clip
        rows = []
        for level in map(float, alphas_cumprod):
            from_sample, from_output, _, eps_from_output = prediction_coefficients(level, prediction_type)
            # With no signal x_t says nothing of the condition: the gradient is zero, and no output stands for another epsilon.
            shift = -math.sqrt(1 - level) / eps_from_output if level > 0 else 0.0
            rows.append((from_sample, from_output, shift))
        self._table = torch.tensor(rows, dtype=torch.float32, device=timesteps.device)

    def __call__(self, x: Tensor, output: Tensor, index: Tensor) -> Tensor:
        """The output of step ``index``, () int64 beside it, at x: all (N, C, H, W) float32.

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
