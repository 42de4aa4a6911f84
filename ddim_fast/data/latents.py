"""Training data in the latent space of an autoencoder."""

from __future__ import annotations

import torch

from ..diffusion.latent import LatentCodec
from .images import ImageSet, to_unit_range

__all__ = ["encoded", "latent_space"]


def latent_space(codec: LatentCodec, size: int | None) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The shapes of an autoencoder's images and of their latents.

    Args:
        codec: an autoencoder whose config has ``in_channels`` and ``latent_channels``.
        size: height and width of the latents; None takes images of the size that the config has as ``sample_size``.

    Raises:
        ValueError: the config has none.
    """
    config = codec.autoencoder.config
    factor = codec.decode(torch.zeros(1, config.latent_channels, 8, 8, dtype=torch.float32)).shape[-1] // 8
    if size is None:
        if getattr(config, "sample_size", None) is None:
            raise ValueError(f"the autoencoder has no image size: give --set sample_size=N for images of {factor} * N")
        size = config.sample_size // factor
    return (config.in_channels, size * factor, size * factor), (config.latent_channels, size, size)


def encoded(data: ImageSet, codec: LatentCodec, mirrored: bool) -> ImageSet:
    """The images' latents, float32 on the host, computed once.

    Args:
        data: the images, (N, C, H, W).
        codec: the autoencoder.
        mirrored: append the latents of the images mirrored left to right, which differ from mirrored latents.
    """
    parts = []
    for flips in ([], [3]) if mirrored else ([],):
        parts += [codec.encode(to_unit_range(batch.flip(flips))).cpu() for batch in data.images.split(256)]
    labels = data.labels if data.labels is None or not mirrored else data.labels.repeat(2)
    return ImageSet(torch.cat(parts), labels, resized=data.resized, left_out=data.left_out)
