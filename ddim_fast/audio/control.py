"""Guidance of sounds along a loudness curve."""

from __future__ import annotations

from torch import Tensor

from ..diffusion.guidance import Gradient, likelihood_gradient
from ..diffusion.sampler import Sampler
from .codec import Codec

__all__ = ["loudness_guidance", "restyle"]


def loudness_guidance(sampler: Sampler, codec: Codec, curve: Tensor, std: float) -> Gradient:
    """Classifier guidance towards a loudness curve; each frame's loudness is modelled as normally distributed around it.

    Args:
        curve: (N, frames) in decibels, such as ``codec.loudness`` of a recording.
        std: standard deviation in decibels. Smaller values follow the curve more closely, until steps overshoot.

    Returns:
        The ``gradient`` for :meth:`ddim_fast.Sampler.sample`, for batches of N sounds.

    Raises:
        ValueError: the standard deviation is not positive, or the curve lacks the model's number of frames.
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
    """Convert recordings to another voice or word: encode to noise under one class and decode under another (Su et al. 2023),
    while the loudness follows a curve.

    Args:
        images: (N, C, H, W), the recordings encoded by ``codec``.
        source: the recordings' classes, one or N of them, or None.
        target: the new classes, one or N of them.
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
