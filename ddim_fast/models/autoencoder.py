"""A small convolutional autoencoder for latent diffusion (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..ops.group_norm_silu import group_norm_silu
from .checkpoint import WEIGHTS, load_config, save_checkpoint
from .config import AutoencoderConfig
from .weights import Checkpoint, read_weights

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    """Images to latents and back. Latents of the training images have mean 0 and variance 1 in each channel.

    Args:
        config: the architecture, see :class:`AutoencoderConfig`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        if not isinstance(config, AutoencoderConfig):
            raise ValueError(f"Autoencoder takes an AutoencoderConfig; got {config!r}")
        self.config = config
        widths = config.level_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
            *_levels(config, widths, _down),
            _NormSiLU(config, widths[-1]),
            nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1),
            *_levels(config, widths[::-1], _up),
            _NormSiLU(config, widths[0]),
            nn.Conv2d(widths[0], config.in_channels, 3, padding=1),
        )
        # Set by fit_scale, not trained. They are parameters to be saved and averaged with the others.
        self.latent_mean = nn.Parameter(torch.zeros(config.latent_channels, 1, 1), requires_grad=False)
        self.latent_std = nn.Parameter(torch.ones(config.latent_channels, 1, 1), requires_grad=False)

    def blocks(self) -> Iterator[nn.Module]:
        """The modules that run one after the other, in that order."""
        yield from (*self.encoder.children(), *self.decoder.children())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.latent_mean.device

    def encode(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images in [-1, 1] -> (N, latent channels, H / factor, W / factor)."""
        return (self.posterior(images)[0] - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents from :meth:`encode`; not clipped."""
        return self.decoder(latents * self.latent_std + self.latent_mean)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents in training (Kingma and Welling 2014), before scaling to mean 0 and variance
        1."""
        if tuple(images.shape[1:]) != self.config.image_shape:
            expected = ", ".join(map(str, self.config.image_shape))
            raise ValueError(f"the autoencoder takes images of shape (N, {expected}); got {tuple(images.shape)}")
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        # Beyond this, exp() overflows in a diverged training without a trace in the loss.
        return mean, log_variance.clamp(-30, 20)

    @torch.no_grad()
    def fit_scale(self, images: Tensor, batch_size: int = 64) -> None:
        """Find the latents' mean and standard deviation, which :meth:`encode` and :meth:`decode` use for scaling.

        Args:
            images: (N, C, H, W) in [-1, 1], on any device: training images, or a thousand of them.
        """
        latents = torch.cat([self.posterior(part.to(self.device))[0] for part in images.split(batch_size)]).double()
        self.latent_mean.copy_(latents.mean(dim=(0, 2, 3))[:, None, None])
        self.latent_std.copy_(latents.std(dim=(0, 2, 3))[:, None, None])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Autoencoder:
        """Load a folder of :meth:`save_pretrained`, in eval mode, on the CPU.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or not of an autoencoder; the message names it.
        """
        folder = Path(folder)
        config = load_config(folder, AutoencoderConfig)
        weights, tensors = read_weights(folder, WEIGHTS)
        return Checkpoint(weights, config, tensors).network(cls)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_checkpoint(Path(folder), self.config, self.state_dict())


def _levels(config: AutoencoderConfig, widths: tuple[int, ...], resampler: Callable[[int], nn.Module]) -> list[nn.Module]:
    """Residual blocks of these widths, and ``resampler`` from each level to the next."""
    modules: list[nn.Module] = []
    channels = widths[0]
    for level, width in enumerate(widths):
        if level:
            modules.append(resampler(channels))
        for _ in range(config.layers_per_block):
            modules.append(_ResidualBlock(config, channels, width))
            channels = width
    return modules


def _down(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _up(channels: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))


class _NormSiLU(nn.GroupNorm):
    def __init__(self, config: AutoencoderConfig, channels: int) -> None:
        super().__init__(config.norm_num_groups, channels, config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)


class _ResidualBlock(nn.Module):
    def __init__(self, config: AutoencoderConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _NormSiLU(config, in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            _NormSiLU(config, out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)
