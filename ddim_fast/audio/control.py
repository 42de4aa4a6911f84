"""Guidance by what is heard: sounds that follow a curve of loudness."""

from __future__ import annotations

from torch import Tensor

from ..diffusion.guidance import Gradient, likelihood_gradient
from ..diffusion.sampler import Sampler
from .codec import Codec

__all__ = ["loudness_guidance", "restyle"]


def loudness_guidance(sampler: Sampler, codec: Codec, curve: Tensor, std: float) -> Gradient:
    """Classifier guidance towards a curve of loudness, around which that of each frame is taken to be normally distributed.

    Args:
        curve: (N, frames) in decibels, such as ``codec.loudness`` of a recording.
        std: standard deviation in decibels. The smaller it is, the closer the curve is followed, until steps overshoot.

    Returns:
        What :meth:`ddim_fast.Sampler.sample` takes as ``gradient``, for batches of N sounds.

    Raises:
        ValueError: the standard deviation is not positive, or the curve has not the model's frames.
    """
    if not std > 0:
        raise ValueError(f"the standard deviation of the loudness must be positive, in decibels; got {std}")
    if curve.ndim != 2 or curve.shape[1] != codec.config.frames:
        raise ValueError(f"a loudness curve has shape (N, {codec.config.frames}); got {tuple(curve.shape)}")
    curve = curve.to(sampler.device)
    return likelihood_gradient(lambda x0: -((codec.loudness(x0) - curve) / std).square().sum(1) / 2, sampler)


def restyle(
    sampler: Sampler,
    codec: Codec,
    images: Tensor,
    *,
    source: Tensor | int | None,
    target: Tensor | int,
    curve: Tensor | None = None,
    std: float = 8.0,
    guidance: float | None = None,
    exact: bool = False,
) -> Tensor:
    """Recordings in another voice or with another word: encoded to noise under one class and decoded under another (Su et al.
    2023), while their loudness follows a curve.

    Args:
        images: (N, C, H, W), what ``codec`` makes of the recordings.
        source: the recordings' classes, one or N of them, or None.
        target: the classes that they become.
        curve, std: as of :func:`loudness_guidance`; None leaves the loudness free.
        guidance: scale of classifier-free guidance towards ``target``.
        exact: as of :meth:`ddim_fast.Sampler.encode`.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: as of :meth:`ddim_fast.Sampler.sample` and :func:`loudness_guidance`.
    """
    gradient = None if curve is None else loudness_guidance(sampler, codec, curve, std)
    latents = sampler.encode(images, labels=source, exact=exact)
    return sampler.sample(x_T=latents, labels=target, guidance=guidance, gradient=gradient, batch_size=len(images))
