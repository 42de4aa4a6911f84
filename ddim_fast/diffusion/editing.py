"""Editing: new images that keep a part of given ones.

Each edit goes back to a noise level and samples from there. ``strength`` is that level as a share of the training timesteps: at
1 the image is all noise, and only the noise can keep anything; at 0 nothing happens. At any strength an edit takes the
sampler's number of steps, if there are enough timesteps; listed or adaptive timesteps are used up to its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..models.unet import Labels
from ..ops.scalars import is_finite, plain
from .latent import LatentSampler
from .request import as_tensor
from .sampler import Sampler

__all__ = ["attribute_direction", "move_along", "sdedit", "start_timestep", "swap_class"]

AnySampler = Sampler | LatentSampler


def start_timestep(strength: float, num_train_timesteps: int) -> int | None:
    """The timestep at which an edit of ``strength`` starts; None if it changes nothing.

    Raises:
        ValueError: the strength does not lie in [0, 1].
    """
    strength = plain(strength)
    if not is_finite(strength) or not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1]; got {strength!r}")
    steps = round(strength * num_train_timesteps)
    return steps - 1 if steps else None


def sdedit(
    sampler: AnySampler,
    images: Tensor,
    strength: float,
    *,
    seeds: Sequence[int],
    labels: Labels = None,
    guidance: float | None = None,
    batch_size: int = 64,
) -> Tensor:
    """SDEdit (Meng et al. 2022, arXiv 2108.01073): add noise to the images, then denoise them. Structures coarser than the
    noise stay; at strength 1 nothing stays, and it is plain sampling.

    Args:
        images: (N, C, H, W) in [-1, 1].
        seeds: N integers, one per image.
        labels, guidance, batch_size: as in :meth:`ddim_fast.Sampler.sample`.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: as there, or the strength is out of range.
    """
    part = _part(sampler, strength)
    if part is None:
        return as_tensor(images)
    noisy = part.noised(images, seeds)
    x_T = None if strength == 1 else noisy  # sampling starts from pure noise, although a trace of the image would remain there
    return part.sample(x_T=x_T, seeds=seeds, labels=labels, guidance=guidance, batch_size=batch_size)


def swap_class(
    sampler: AnySampler,
    images: Tensor,
    *,
    source: Labels,
    target: Labels,
    strength: float = 1.0,
    guidance: float | None = None,
    exact: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """Move images from one class to another: encode under one label and decode under the other. The noise keeps pose, size or
    light (Su et al. 2023, "Dual diffusion implicit bridges", arXiv 2203.08382, with one network for both domains).

    Args:
        images: (N, C, H, W) in [-1, 1].
        source, target: class labels, one or N of them.
        strength: less than 1 keeps more of the image.
        guidance: scale of classifier-free guidance towards ``target``; encoding is not guided.
        exact: as in :meth:`ddim_fast.Sampler.encode`.
        batch_size: images a network call.

    Returns:
        (N, C, H, W) float32. With the source as the target and no guidance, they are the reconstructions of the images.

    Raises:
        ValueError: as there, or the strength is out of range.
    """
    part = _part(sampler, strength)
    latents = _encode(part, images, labels=source, exact=exact, batch_size=batch_size)
    return _decode(part, latents, labels=target, guidance=guidance, batch_size=batch_size)


def attribute_direction(
    sampler: AnySampler,
    examples: Tensor,
    counterexamples: Tensor,
    *,
    labels: tuple[Labels, Labels] = (None, None),
    strength: float = 1.0,
    exact: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """The mean latent of images with an attribute minus that of images without it, the common attribute direction of generative
    models (Radford et al. 2016; Preechakul et al. 2022, for diffusion models).

    Args:
        examples: (N, C, H, W) in [-1, 1], images with the attribute.
        counterexamples: (M, C, H, W), images without it.
        labels: class labels of the two sets.
        strength, exact, batch_size: as for :func:`swap_class`.

    Returns:
        (C, H, W) float32, a difference of latents at that strength.

    Raises:
        ValueError: there are no images on one side, or as for :func:`swap_class`.
    """
    if len(examples) == 0 or len(counterexamples) == 0:
        raise ValueError(
            f"an attribute needs images with it and without it; got {len(examples)} and {len(counterexamples)} of them"
        )
    part = _part(sampler, strength)
    with_it, without_it = (
        _encode(part, images, labels=of, exact=exact, batch_size=batch_size).mean(0)
        for images, of in zip((examples, counterexamples), labels, strict=True)
    )
    return with_it - without_it


def move_along(
    sampler: AnySampler,
    images: Tensor,
    direction: Tensor,
    amount: float = 1.0,
    *,
    labels: Labels = None,
    strength: float = 1.0,
    guidance: float | None = None,
    exact: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """Images with more of an attribute, or less with a negative amount: encoded, moved along its direction, and decoded.

    Args:
        images: (N, C, H, W) in [-1, 1].
        direction: (C, H, W), from :func:`attribute_direction` at the same strength.
        amount: 1 is the difference of the averages; 0 is the reconstruction of the images.
        labels: class labels, one or N of them.
        strength, guidance, exact, batch_size: as for :func:`swap_class`.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: as for :func:`swap_class`, or the direction has another shape, or the amount is not finite.
    """
    part, direction = _part(sampler, strength), as_tensor(direction)
    if direction.shape != sampler.config.image_shape:
        raise ValueError(f"the direction must be of shape {sampler.config.image_shape}; got {tuple(direction.shape)}")
    amount = plain(amount)
    if not is_finite(amount):
        raise ValueError(f"amount must be a finite number; got {amount!r}")
    latents = _encode(part, images, labels=labels, exact=exact, batch_size=batch_size)
    moved = latents + amount * direction.to(latents)
    return _decode(part, moved, labels=labels, guidance=guidance, batch_size=batch_size)


def _part(sampler: AnySampler, strength: float) -> AnySampler | None:
    """The sampler from an edit's start, or None if the edit changes nothing."""
    start = start_timestep(strength, sampler.schedule.num_train_timesteps)
    return None if start is None else sampler.starting_at(start)


def _encode(part: AnySampler | None, images: Tensor, **request: Any) -> Tensor:
    return as_tensor(images) if part is None else part.encode(images, **request)


def _decode(part: AnySampler | None, latents: Tensor, **request: Any) -> Tensor:
    return latents if part is None else part.sample(x_T=latents, **request)
