"""Log-mel spectrograms, and sounds reconstructed from them."""

from __future__ import annotations

import functools

import librosa
import numpy as np

from ..models.audio import AudioConfig

__all__ = ["griffin_lim", "log_mel"]

# Iterations of Griffin and Lim's algorithm, with the momentum of Perraudin et al. 2013: after 32 the error hardly falls.
_PHASE_ITERATIONS = 32

# Multiplicative updates that invert the mel filters. librosa's own solver gets no closer and takes two seconds per sound.
_MEL_ITERATIONS = 30


def log_mel(waves: np.ndarray, config: AudioConfig) -> np.ndarray:
    """(N, length) in [-1, 1] -> (N, mels, frames) float32, decibels clipped to the config's range.

    The filters overlap so that they add up to 1, and powers are scaled as Parseval's theorem says: the bands of a frame add up
    to the mean square of its samples under the window.
    """
    padded = np.pad(waves, ((0, 0), (config.margin, config.margin)))
    spectrum = librosa.stft(padded, n_fft=config.n_fft, hop_length=config.hop, center=False)
    power = np.matmul(_filters(config), np.abs(spectrum) ** 2) * _scale(config)
    decibels = librosa.power_to_db(power, amin=1e-12, top_db=None)
    return decibels.clip(config.floor_db, config.ceiling_db).astype(np.float32)


def griffin_lim(decibels: np.ndarray, config: AudioConfig) -> np.ndarray:
    """(N, mels, frames) decibels -> (N, length) float32 sounds, not clipped; the phase is by Griffin and Lim 1984. It starts
    from the same random numbers each time, so the same spectrogram gives the same sound.
    """
    power = librosa.db_to_power(decibels.astype(np.float32)) / _scale(config)
    magnitude = np.sqrt(_without_filters(power, _filters(config)))
    options = {"n_iter": _PHASE_ITERATIONS, "hop_length": config.hop, "n_fft": config.n_fft, "random_state": 0}
    # One at a time: in a batch, sounds would start from different random numbers.
    waves = np.stack([librosa.griffinlim(part, center=False, **options) for part in magnitude])
    return waves[:, config.margin : config.margin + config.length]


def _without_filters(power: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """(N, mels, frames) -> (N, 1 + n_fft / 2, frames): non-negative powers that the filters map to ``power`` up to a small
    error. Least squares by the multiplicative updates of Lee and Seung 2001, from a smooth spectrum.
    """
    transposed = filters.T
    target, gram = transposed @ power, transposed @ filters
    spectrum = transposed @ (power / filters.sum(axis=1)[:, None])
    for _ in range(_MEL_ITERATIONS):
        spectrum *= target / np.maximum(gram @ spectrum, np.finfo(np.float32).tiny)
    return spectrum


@functools.cache
def _filters(config: AudioConfig) -> np.ndarray:
    """(mels, 1 + n_fft / 2) triangles of height 1."""
    from librosa.filters import mel

    return mel(sr=config.sample_rate, n_fft=config.n_fft, n_mels=config.mels, norm=None)


def _scale(config: AudioConfig) -> float:
    """The weights whose products with one-sided powers |STFT|^2 give the mean square of the samples."""
    from librosa.filters import get_window

    window = get_window("hann", config.n_fft)
    return 2 / (config.n_fft * float((window**2).sum()))
