"""The losses of training: denoising, or consistency, for a diffusion model; reconstruction for an autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.prediction import linear_prediction, training_target
from ..diffusion.schedule import NoiseSchedule
from ..models.autoencoder import Autoencoder

__all__ = ["AutoencoderLoss", "ConsistencyLoss", "DenoisingLoss"]

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

    def draw(self, model: nn.Module, images: Tensor, size: int, done: float = 0.0) -> Drawn:
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


class ConsistencyLoss(nn.Module):
    """Difference of the network's x_0 at two noise levels of the same image and noise, of which the lower one is the target
    (Song et al. 2023), with the noise levels and weights of easy consistency tuning (Geng et al. 2024): the two levels begin
    far apart, which is denoising for the lowest ones, and close up during the training. The network then leads from every noise
    level to the image in one step.

    Noise levels are sigma = sqrt(1 / alphas_cumprod - 1): log-normal with mean -1.1 and standard deviation 2, at the next
    timestep of the schedule. The lower one is (1 - 2^-k (1 + 8 / (1 + e^sigma))) sigma, or none, in stage k = 1..8 of the
    training. The difference is sqrt(|x|^2 + c^2) - c with c = 0.00054 sqrt(numbers of an image) (Song and Dhariwal 2024, eq.
    8), over that of the two sigma. So low noise has most of the weight; it must have: with weights that were equal over the
    levels, images drifted to too much contrast, because each level learns from the one below.

    Args:
        schedule: the noise schedule.
        prediction_type: what the network predicts: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    _STAGES = 8
    _MEAN, _STD = -1.1, 2.0
    _CHEAP, _SOFT = 8.0, 0.00054

    levels: Tensor
    table: Tensor

    def __init__(self, schedule: NoiseSchedule, prediction_type: str) -> None:
        super().__init__()
        bar = schedule.alphas_cumprod
        if bar[-1] == 0:
            raise ValueError("consistency needs a schedule without zero terminal SNR: its last noise level is infinite")
        to_x0 = linear_prediction(prediction_type, np.sqrt(bar), np.sqrt(1 - bar))[:2]
        # Entry 0 is the image itself, entry t + 1 is timestep t.
        self.register_buffer("levels", _fp32(np.append(0.0, np.sqrt(1 / bar - 1))))
        rows = (np.sqrt(bar), np.sqrt(1 - bar), *np.broadcast_arrays(*to_x0, bar)[:2])
        self.register_buffer("table", _fp32(np.stack([np.append(*ends) for ends in zip((1, 0, 1, 0), rows, strict=True)])))

    def draw(self, model: nn.Module, images: Tensor, size: int, done: float = 0.0) -> Drawn:
        """The entries of both noise levels in the tables, and noise, of ``size`` images like ``images``, from torch's default
        generator: int64 (size,) twice, the higher first, and float32 (size, C, H, W) in the images' memory format.

        Args:
            done: the share of the training that is done, which decides how far apart the levels are.
        """
        sigma = (self._MEAN + self._STD * torch.randn(size, device=images.device)).exp()
        above = torch.searchsorted(self.levels, sigma).clamp(1, len(self.levels) - 1)
        sigma = self.levels[above]
        stage = 1 + min(int(done * self._STAGES), self._STAGES - 1)
        share = (1 - 0.5**stage * (1 + self._CHEAP * torch.sigmoid(-sigma))).clamp(min=0)
        # The next entry that is lower than this: another one, or the image itself.
        below = torch.minimum(torch.searchsorted(self.levels, share * sigma, right=True) - 1, above - 1)
        return above, below, _normal((size, *images.shape[1:]), images)

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None, drawn: Drawn | None = None) -> Tensor:
        """The loss of one batch, a 0-dim fp32 tensor.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            labels: (N,) int64, or None.
            drawn: the random numbers of these images, from :meth:`draw`; None draws them.
        """
        above, below, noise = self.draw(model, images, len(images)) if drawn is None else drawn
        x0 = self._predict_x0(model, images, labels, noise, above)
        with torch.no_grad():  # after the other: autocast would keep this one's weights, which have no gradient
            target = self._predict_x0(model, images, labels, noise, below)
        soft = self._SOFT * images[0].numel() ** 0.5
        distance = ((x0 - target).square().sum(dim=(1, 2, 3)) + soft**2).sqrt() - soft
        return (distance / (self.levels[above] - self.levels[below])).mean()

    def _predict_x0(self, model: nn.Module, images: Tensor, labels: Tensor | None, noise: Tensor, entry: Tensor) -> Tensor:
        signal, sigma, from_sample, from_output = self.table[:, entry, None, None, None]
        x = signal * images + sigma * noise
        return from_sample * x + from_output * model(x, (entry - 1).clamp(min=0), labels).float()


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

    def draw(self, model: Autoencoder, images: Tensor, size: int, done: float = 0.0) -> Drawn:
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
