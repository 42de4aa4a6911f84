"""Gaps and missing bandwidth of recordings, as degradations that :meth:`ddim_fast.Sampler.restore` inverts."""

from __future__ import annotations

import librosa
import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.degradations import Mask
from ..models.audio import AudioConfig

__all__ = ["band_limit", "gap"]


def gap(config: AudioConfig, start: float, end: float) -> Mask:
    """Recordings with a gap in time. In a spectrogram, every frame that overlaps the gap is missing.

    Args:
        config: the model's sound format; a shorter recording lies in the middle of the sound.
        start, end: in seconds from the beginning of the model's sound.

    Raises:
        ValueError: the gap is empty, not within the sound, or the whole of it.
    """
    seconds = config.length / config.sample_rate
    if not 0 <= start < end <= seconds:
        raise ValueError(f"a gap has a start and a later end, from 0 to {seconds:g} s; got {start:g} and {end:g}")
    first, last = start * config.sample_rate, end * config.sample_rate
    if config.kind == "waveform":
        samples = torch.arange(config.length)
        known = (samples < first) | (samples >= last)
        return Mask(_checked(known, "the gap").view(-1, config.fold).t()[:, None])
    begins = torch.arange(config.frames) * config.hop - config.margin
    known = (begins + config.n_fft <= first) | (begins >= last)
    return _of_spectrogram(_checked(known, "the gap").expand(config.mels, -1), config)


def band_limit(config: AudioConfig, cutoff: float) -> Mask:
    """Recordings without the frequencies above a cutoff, as over a telephone. The bands that end below it are known.

    Args:
        config: the model's sound format; spectrograms, because a waveform has no frequency axis.
        cutoff: in Hz.

    Raises:
        ValueError: the model is of waveforms, or the cutoff leaves nothing known or nothing to restore.
    """
    if config.kind != "mel":
        raise ValueError("bandwidth extension needs a model of spectrograms; this model's sounds are waveforms")
    edges = librosa.mel_frequencies(config.mels + 2, fmax=config.sample_rate / 2)
    known = torch.from_numpy(edges[2:] <= cutoff)
    remedy = f"; name one from {edges[2]:.0f} to {edges[-1]:.0f} Hz"
    return _of_spectrogram(_checked(known, f"a cutoff of {cutoff:g} Hz", remedy)[:, None].expand(-1, config.frames), config)


def _checked(known: Tensor, what: str, remedy: str = "") -> Tensor:
    if known.all() or not known.any():
        raise ValueError(f"{what} leaves {'nothing to restore' if known.all() else 'nothing to restore from'}{remedy}")
    return known


def _of_spectrogram(known: Tensor, config: AudioConfig) -> Mask:
    """From (mels, frames)."""
    return Mask(F.pixel_unshuffle(known[None].float(), config.fold))
