"""The losses of training: denoising for a diffusion model, reconstruction for an autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.prediction import linear_prediction, training_target
from ..diffusion.schedule import NoiseSchedule
from ..models.autoencoder import Autoencoder

__all__ = ["AutoencoderLoss", "DenoisingLoss"]

# The random numbers of a batch, one tensor a kind, whose first dimension is that of the images.
Drawn = tuple[Tensor, ...]


class DenoisingLoss(nn.Module):
    """Mean squared error of the network's prediction at random timesteps (Ho et al. 2020, eq. 14), optionally with the
    min-SNR weighting of Hang et al. 2023.

    Args:
        schedule: the noise schedule.
        prediction_type: what the network predicts: ``epsilon``, ``v_prediction`` (Salimans and Ho 2022) or ``sample``.
        min_snr_gamma: the bound gamma on the signal-to-noise ratio, or None for the unweighted loss. The weight of the
            squared error in x_0 is min(SNR, gamma), expressed in terms of what is predicted.
    """

    signal: Tensor
    noise: Tensor
    weight: Tensor

    def __init__(self, schedule: NoiseSchedule, prediction_type: str, min_snr_gamma: float | None = None) -> None:
        super().__init__()
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive; got {min_snr_gamma}")
        self.prediction_type = prediction_type
        bar = schedule.alphas_cumprod
        self.register_buffer("signal", _fp32(np.sqrt(bar)))
        self.register_buffer("noise", _fp32(np.sqrt(1 - bar)))
        # The squared error in x_0 is that of the output times the square of its coefficient; at zero SNR epsilon says nothing.
        with np.errstate(divide="ignore", invalid="ignore"):
            snr = bar / (1 - bar)
            capped = np.minimum(snr, np.inf if min_snr_gamma is None else min_snr_gamma)
            to_x0 = linear_prediction(prediction_type, np.sqrt(bar), np.sqrt(1 - bar)).x0_from_output
            weight = np.nan_to_num(capped * np.square(to_x0), nan=0.0)
        self.register_buffer("weight", _fp32(weight if min_snr_gamma is not None else np.ones_like(bar)))

    def draw(self, model: nn.Module, images: Tensor, size: int) -> Drawn:
        """Timesteps and noise of ``size`` images like ``images``, from torch's default generator: int64 (size,) and float32
        (size, C, H, W) in the images' memory format."""
        timesteps = torch.randint(len(self.signal), (size,), device=images.device)
        return timesteps, _normal((size, *images.shape[1:]), images)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None, drawn: Drawn | None = None) -> Tensor:
        """The loss of one batch, a 0-dim fp32 tensor.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            labels: (N,) int64, or None.
            drawn: the random numbers of these images, from :meth:`draw`; None draws them.
        """
        timesteps, noise = self.draw(model, images, len(images)) if drawn is None else drawn
        signal, sigma = (table[timesteps][:, None, None, None] for table in (self.signal, self.noise))
        prediction = model(signal * images + sigma * noise, timesteps, labels).float()
        target = training_target(self.prediction_type, images, noise, signal, sigma)
        return (self.weight[timesteps] * (prediction - target).square().mean(dim=(1, 2, 3))).mean()


class AutoencoderLoss(nn.Module):
    """Mean absolute error of the images from latents drawn at random, and their Kullback-Leibler divergence from the normal
    distribution, in small part, which keeps them smooth (Kingma and Welling 2014; Rombach et al. 2022, section 3.1). Of that
    paper's loss the perceptual and adversarial parts are left out, which need networks of their own.

    Args:
        kl_weight: of the divergence's mean over the latents' numbers.
    """

    def __init__(self, kl_weight: float = 1e-4) -> None:
        super().__init__()
        self.kl_weight = kl_weight

    def draw(self, model: Autoencoder, images: Tensor, size: int) -> Drawn:
        """The noise of the latents of ``size`` images like ``images``, from torch's default generator: float32 (size, latent
        channels, h, w)."""
        config = model.config
        side = config.sample_size // config.factor
        return (_normal((size, config.latent_channels, side, side), images),)

    def forward(self, model: Autoencoder, images: Tensor, labels: Tensor | None, drawn: Drawn | None = None) -> Tensor:
        """The loss of one batch, a 0-dim fp32 tensor; labels are not used.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            drawn: the random numbers of these images, from :meth:`draw`; None draws them.
        """
        mean, log_variance = (part.float() for part in model.posterior(images))
        (noise,) = (torch.randn_like(mean),) if drawn is None else drawn
        latents = mean + torch.exp(0.5 * log_variance) * noise
        error = (model.decoder(latents).float() - images).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return error + self.kl_weight * divergence


def _normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal numbers in the memory format of ``like``, in whose order they are drawn."""
    is_last = like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(shape, device=like.device, memory_format=memory_format).normal_()


def _fp32(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table).float()
