"""The losses of training: denoising, or consistency, for a diffusion model; reconstruction for an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Denoiser
from ..diffusion.loop import Loop
from ..diffusion.prediction import linear_prediction, training_target
from ..diffusion.request import Request
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import make_solver
from ..diffusion.timesteps import select_timesteps, unipc_timesteps
from ..engine import make_engine
from ..models.autoencoder import Autoencoder
from ..models.unet import UNet

__all__ = ["AutoencoderLoss", "ConsistencyLoss", "DenoisingLoss", "TrainingLoss"]

# The random numbers of a batch, one tensor a kind, whose first dimension is that of the images.
Drawn = tuple[Tensor, ...]


class TrainingLoss(nn.Module):
    """What the losses share: random numbers are drawn for the whole batch, and completed for each slice of it."""

    def complete(self, images: Tensor, labels: Tensor | None, drawn: Drawn) -> Drawn:
        """What :meth:`forward` takes besides the images, from their random numbers; computed without gradients and never
        compiled."""
        return drawn


class DenoisingLoss(TrainingLoss):
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


class ConsistencyLoss(TrainingLoss):
    """Distance of the network's x_0 to the image at which a teacher arrives in many steps (Luhman and Luhman 2021), at each
    of the few timesteps at which the network will be sampled: there it becomes the consistency function of Song et al. 2023,
    which leads to the image in one step.

    The teacher goes by UniPC from an image with the noise of the first timestep, in ten steps and those that the timesteps of
    the network add. The distance is sqrt(|x|^2 + c^2) - c with c = 0.03 sqrt(numbers of an image) (Song and Dhariwal 2024,
    eq. 8). Consistency training, in which the target is the network's own x_0 at a lower noise level, needs no teacher, but
    with twice as many images it made a model of more than twice the KID.

    Args:
        teacher: the network from which the training begins.
        timesteps: the timesteps at which the network will be sampled, falling.
        dtype: of the teacher's computation.

    Raises:
        ValueError: the timesteps are not the network's.
    """

    _TEACHER_STEPS = 10
    _SOFT = 0.03

    timesteps: Tensor
    table: Tensor

    def __init__(self, teacher: UNet, timesteps: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        denoiser = Denoiser(teacher, dtype=dtype)
        prediction_type, steps = teacher.config.prediction_type, min(self._TEACHER_STEPS, teacher.config.num_train_timesteps)
        between = [t for t in unipc_timesteps(teacher, denoiser.schedule, steps) if t < timesteps[0]]
        self._visited = select_timesteps(denoiser.schedule, None, sorted({*timesteps, *between}))
        levels = denoiser.schedule.levels(self._visited)
        solver = make_solver("unipc", levels, 0.0, prediction_type, None)
        self._teacher = Loop(denoiser, solver, make_engine("eager", denoiser.device))
        own = np.isin(self._visited, timesteps)
        self._states = np.flatnonzero(own).tolist()
        bar = levels[:-1][own]
        self.register_buffer("timesteps", torch.tensor(timesteps))
        rows = (np.sqrt(bar), np.sqrt(1 - bar), *linear_prediction(prediction_type, np.sqrt(bar), np.sqrt(1 - bar))[:2])
        self.register_buffer("table", _fp32(np.stack(np.broadcast_arrays(*rows))))

    def draw(self, model: nn.Module, images: Tensor, size: int) -> Drawn:
        """The noise of ``size`` images like ``images``, from torch's default generator: float32 (size, C, H, W) in the images'
        memory format."""
        return (_normal((size, *images.shape[1:]), images),)

    def complete(self, images: Tensor, labels: Tensor | None, drawn: Drawn) -> Drawn:
        """The teacher's trajectories where they pass the K timesteps, float32 (N, K, C, H, W), and their ends, (N, C, H, W)."""
        signal, sigma = self.table[:2, 0]
        x = signal * images + sigma * drawn[0]
        states = [x, *(state.x for state in self._teacher.trajectory(Request(None, x, labels), self._visited))]
        return torch.stack([states[i] for i in self._states], dim=1), states[-1].clone()

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor | None, drawn: Drawn | None = None) -> Tensor:
        """The loss of one batch, a 0-dim fp32 tensor.

        Args:
            images: (N, C, H, W) float32 in [-1, 1].
            labels: (N,) int64, or None.
            drawn: the trajectories of these images, from :meth:`complete`; None makes them.
        """
        if drawn is None:
            drawn = self.complete(images, labels, self.draw(model, images, len(images)))
        starts, ends = drawn
        count, steps = starts.shape[:2]
        x = starts.flatten(0, 1).contiguous(memory_format=_memory_format(images))
        every = None if labels is None else labels.repeat_interleave(steps)
        output = model(x, self.timesteps.repeat(count), every).float()
        from_sample, from_output = self.table[2:].repeat(1, count)[..., None, None, None]
        error = from_sample * x + from_output * output - ends.repeat_interleave(steps, dim=0)
        soft = self._SOFT * images[0].numel() ** 0.5
        return ((error.square().sum(dim=(1, 2, 3)) + soft**2).sqrt() - soft).mean()


class AutoencoderLoss(TrainingLoss):
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
    return torch.empty(shape, device=like.device, memory_format=_memory_format(like)).normal_()


def _memory_format(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _fp32(table: np.ndarray) -> Tensor:
    return torch.from_numpy(table).float()
