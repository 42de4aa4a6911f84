"""Diffusion in the latent space of an autoencoder (Rombach et al. 2022)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engine import inference
from ..models.config import DiffusionModel
from ..models.unet_blocks import batch_invariant
from .degradations import LinearOperator
from .request import as_tensor
from .restoration import Restoration
from .sampler import Sampler
from .trajectory import SamplerState

__all__ = ["LatentCodec", "LatentSampler", "LatentState"]

# The default number of images per call of the autoencoder.
_AT_ONCE = 64


class LatentCodec:
    """An autoencoder as two functions of tensors, with latents scaled as in the network's training.

    Args:
        autoencoder: :class:`ddim_fast.Autoencoder`; diffusers' ``AutoencoderKL``, whose latents are the means of its
            distributions, shifted and scaled as its config says; its ``AutoencoderTiny``; or another module whose ``encode``
            and ``decode`` take and return tensors. It is put in eval mode and computes on the device and in the dtype of its
            parameters.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        self.autoencoder: Any = autoencoder.eval()
        config = getattr(autoencoder, "config", None)
        fields = ("shift_factor", "scaling_factor", "latents_mean", "latents_std")
        shift, scale, mean, std = (getattr(config, name, None) for name in fields)
        self._shift = _per_channel(mean or [shift or 0.0])
        self._scale = (scale or 1.0) / _per_channel(std or [1.0])

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = _AT_ONCE) -> Tensor:
        """(N, C, H, W) images in [-1, 1] -> (N, c, h, w) float32, on the autoencoder's device."""
        latents = self._call(self.autoencoder.encode, images, batch_size)
        return ((latents - self._shift.to(latents.device)) * self._scale.to(latents.device)).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = _AT_ONCE) -> Tensor:
        """The images of latents, (N, C, H, W) float32; not clipped."""
        x = latents / self._scale.to(latents.device) + self._shift.to(latents.device)
        return self._call(self.autoencoder.decode, x, batch_size).contiguous()

    def _call(self, function: Callable[[Tensor], Any], x: Tensor, batch_size: int) -> Tensor:
        """``function`` of the autoencoder, applied to some images at a time."""
        like = next(self.autoencoder.parameters())
        parts = [batch_invariant(lambda x: _tensor(function(x)), part.to(like)).float() for part in x.split(batch_size)]
        return torch.cat(parts)


class LatentSampler:
    """A sampler of latents with the autoencoder that decodes them: the methods of :class:`Sampler`, for images of the
    autoencoder's size. Attributes not listed here are the sampler's.

    Args:
        sampler: the sampler of a network trained on the autoencoder's latents.
        autoencoder: an autoencoder for :class:`LatentCodec`. It is moved to the sampler's device.

    Attributes:
        image_shape: (C, H, W) of the images.

    Raises:
        ValueError: the autoencoder does not decode latents of the network's shape.
    """

    def __init__(self, sampler: Sampler, autoencoder: nn.Module) -> None:
        self.sampler = sampler
        self.codec = LatentCodec(autoencoder.to(sampler.device))
        shape = sampler.config.image_shape
        try:
            self.image_shape = cast("tuple[int, int, int]", tuple(self.codec.decode(sampler.noise([0])).shape[1:]))
        except RuntimeError as error:
            raise ValueError(f"the autoencoder does not decode the network's latents, of shape {shape}: {error}") from None

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not set yet while a copy is made
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return f"LatentSampler({self.sampler!r}, {type(self.codec.autoencoder).__name__} {shape})"

    @property
    def networks(self) -> tuple[DiffusionModel | nn.Module, ...]:
        """The networks that decide an image."""
        return (*self.sampler.networks, self.codec.autoencoder)

    def sample(
        self, *, batch_size: int = _AT_ONCE, on_step: Callable[[LatentState], None] | None = None, **request: Any
    ) -> Tensor:
        """Images (N, C, H, W), with the arguments and results of :meth:`Sampler.sample`; ``x_T`` has the latents' shape."""
        report = None if on_step is None else (lambda state: on_step(LatentState(state, self.decode)))
        latents = self.sampler.sample(batch_size=batch_size, on_step=report, **request)
        return self.decode(latents, batch_size)

    def trajectory(self, **request: Any) -> Iterator[LatentState]:
        """The states of one batch, one after each step; arguments as in :meth:`Sampler.trajectory`."""
        for state in self.sampler.trajectory(**request):
            yield LatentState(state, self.decode)

    def encode(self, images: Tensor, **options: Any) -> Tensor:
        """The noise (N, latent shape) from which deterministic DDIM makes the latents of ``images``; arguments as in
        :meth:`Sampler.encode`. Details that the autoencoder loses do not come back."""
        return self.sampler.encode(self.latents(images), **options)

    @inference()
    def restore(
        self,
        measurement: Tensor,
        operator: LinearOperator,
        *,
        noise_std: float = 0.0,
        batch_size: int = _AT_ONCE,
        **options: Any,
    ) -> Tensor:
        """Images that ``operator`` maps to ``measurement``, with the arguments of :meth:`Sampler.restore`. Each step decodes an
        image and encodes two. Without noise the decoded images are corrected once more at the end, so that they give the
        measurement up to rounding.

        Raises:
            ValueError: as there, or the measurement is of images of another size than the autoencoder's.
        """
        operator = operator.to(self.device)
        measurement = as_tensor(measurement).to(self.device, torch.float32)
        back_projection = operator.pseudo_inverse(measurement)
        if tuple(back_projection.shape[1:]) != self.image_shape:
            shape = tuple(back_projection.shape[1:])
            raise ValueError(f"the measurement is of images of shape {shape}, but the autoencoder's are {self.image_shape}")
        latents = self.sampler.restore(measurement, operator, noise_std=noise_std, codec=self.codec, **options)
        images = self.decode(latents, batch_size)
        return (
            images
            if noise_std
            else Restoration(operator, self.image_shape, self.image_shape).corrected(images, back_projection)
        )

    def starting_at(self, timestep: int) -> LatentSampler:
        """A sampler from a later start, as :meth:`Sampler.starting_at`."""
        later = copy.copy(self)
        later.sampler = self.sampler.starting_at(timestep)
        return later

    def with_new_engine(self) -> LatentSampler:
        """The same sampler with a new engine, as :meth:`Sampler.with_new_engine`."""
        other = copy.copy(self)
        other.sampler = self.sampler.with_new_engine()
        return other

    def noised(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """The images' latents in the noise of the first timestep, as :meth:`Sampler.noised`."""
        return self.sampler.noised(self.latents(images), seeds)

    @inference()
    def latents(self, images: Tensor, batch_size: int = _AT_ONCE) -> Tensor:
        """The autoencoder's latents of (N, C, H, W) images in [-1, 1], scaled for the network.

        Raises:
            ValueError: the images are not of ``image_shape``.
        """
        images = as_tensor(images)
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected images of shape (N, {expected}); got {tuple(images.shape)}")
        return self.codec.encode(images, batch_size) if len(images) else self.sampler.noise([])

    @inference()
    def decode(self, latents: Tensor, batch_size: int = _AT_ONCE) -> Tensor:
        """The images of (N, c, h, w) latents, (N, C, H, W) float32; not clipped."""
        if len(latents) == 0:
            return torch.empty(0, *self.image_shape, dtype=torch.float32, device=self.device)
        return self.codec.decode(latents, batch_size)


@dataclass
class LatentState:
    """One step of a trajectory in latent space, as :class:`SamplerState`; images are decoded on access.

    Attributes:
        latent: the state of the latents.
    """

    latent: SamplerState
    _decode: Callable[[Tensor], Tensor]

    @property
    def step(self) -> int:
        """The number of the step, from 0."""
        return self.latent.step

    @property
    def timestep(self) -> float:
        """The timestep at which the network was evaluated."""
        return self.latent.timestep

    @property
    def x(self) -> Tensor:
        """(N, C, H, W): the sample after the step, decoded."""
        return self._decode(self.latent.x)

    @property
    def x0(self) -> Tensor:
        """(N, C, H, W): the images as the network predicted them, decoded."""
        return self._decode(self.latent.x0)


def _per_channel(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]


def _tensor(result: Any) -> Tensor:
    """The tensor in an autoencoder's result, which may be one of diffusers' output objects."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "latent_dist"):
        return result.latent_dist.mode()
    return result.latents if hasattr(result, "latents") else result.sample
