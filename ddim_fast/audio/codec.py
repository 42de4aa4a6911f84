"""Conversion of sounds to a network's images, and back."""

from __future__ import annotations

import abc
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.audio import AudioConfig
from .spectrogram import griffin_lim, log_mel

__all__ = ["Codec", "make_codec"]


class Codec(abc.ABC):
    """The transform that an :class:`AudioConfig` describes. Sounds are (N, length) float32 arrays in [-1, 1] on the host,
    images (N, C, H, W) float32 tensors in [-1, 1].

    Attributes:
        silence: the value of images where there is no sound.
    """

    silence: float

    def __init__(self, config: AudioConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def encode(self, waves: np.ndarray) -> Tensor:
        """The images of sounds, on the host."""

    @abc.abstractmethod
    def decode(self, images: Tensor) -> np.ndarray:
        """The sounds of images, clipped to [-1, 1]."""

    @abc.abstractmethod
    def spectrograms(self, images: Tensor) -> Tensor:
        """(N, 1, mels, frames) in [-1, 1]: pictures of images, low notes at the bottom."""

    @abc.abstractmethod
    def loudness(self, images: Tensor) -> Tensor:
        """(N, frames): the level of each frame in decibels, which is 10 log10 of its mean square. Differentiable."""


class MelCodec(Codec):
    """Images are log-mel spectrograms, ``floor_db`` to ``ceiling_db``, in patches of fold x fold."""

    silence = -1.0

    def encode(self, waves: np.ndarray) -> Tensor:
        return F.pixel_unshuffle(_spectrograms(waves, self.config), self.config.fold)

    def decode(self, images: Tensor) -> np.ndarray:
        return griffin_lim(self._decibels(images).cpu().numpy(), self.config).clip(-1, 1)

    def spectrograms(self, images: Tensor) -> Tensor:
        return F.pixel_shuffle(images, self.config.fold).flip(2)

    def loudness(self, images: Tensor) -> Tensor:
        return torch.logsumexp(self._decibels(images) * _NEPERS, dim=1) / _NEPERS

    def _decibels(self, images: Tensor) -> Tensor:
        """(N, mels, frames)"""
        config = self.config
        unit = (F.pixel_shuffle(images, config.fold)[:, 0].clamp(-1, 1) + 1) / 2
        return config.floor_db + unit * (config.ceiling_db - config.floor_db)


def _spectrograms(waves: np.ndarray, config: AudioConfig) -> Tensor:
    """(N, length) -> (N, 1, mels, frames) in [-1, 1], low notes first."""
    unit = (log_mel(waves, config) - config.floor_db) / (config.ceiling_db - config.floor_db)
    return torch.from_numpy(2 * unit - 1)[:, None]


class WaveformCodec(Codec):
    """Images are the sounds themselves, one row of ``fold`` channels: sample ``fold * i + c`` is channel c of position i."""

    silence = 0.0

    def encode(self, waves: np.ndarray) -> Tensor:
        return torch.from_numpy(waves).unflatten(1, (-1, self.config.fold)).transpose(1, 2)[:, :, None].contiguous()

    def decode(self, images: Tensor) -> np.ndarray:
        return self._waves(images).clamp(-1, 1).cpu().numpy()

    def spectrograms(self, images: Tensor) -> Tensor:
        return _spectrograms(self.decode(images), self.config).flip(2)

    def loudness(self, images: Tensor) -> Tensor:
        config = self.config
        waves = F.pad(self._waves(images), (config.margin, config.margin))
        window = torch.hann_window(config.n_fft, dtype=waves.dtype, device=waves.device)
        squares = (waves.unfold(1, config.n_fft, config.hop) * window).square().sum(2) / window.square().sum()
        return 10 * squares.clamp(min=10 ** (config.floor_db / 10)).log10()

    def _waves(self, images: Tensor) -> Tensor:
        return images[:, :, 0].transpose(1, 2).flatten(1)


# Factor from decibels of power to natural logarithms.
_NEPERS = math.log(10) / 10


def make_codec(config: AudioConfig) -> Codec:
    """The codec of ``config.kind``."""
    return {"mel": MelCodec, "waveform": WaveformCodec}[config.kind](config)
