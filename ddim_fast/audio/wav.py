"""WAV files of 16 bits, one channel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from ..io.files import atomic_write
from ..models.audio import AudioConfig

__all__ = ["is_whole_wav", "read_wav", "to_int16", "write_wav"]


def to_int16(waves: np.ndarray) -> np.ndarray:
    """Floating-point samples in [-1, 1] -> int16, values outside clipped.

    Raises:
        ValueError: a sample is NaN or infinite.
    """
    if not np.isfinite(waves).all():
        raise ValueError("the sounds are not finite; try --dtype float32")
    return (waves.clip(-1, 1) * 32767).round().astype(np.int16)


def write_wav(path: Path, wave: np.ndarray, sample_rate: int) -> None:
    """Write (samples,) int16, whole or not at all."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, sample_rate, subtype="PCM_16", format="WAV")
    atomic_write(path, buffer.getvalue())


def read_wav(path: Path) -> np.ndarray:
    """(samples,) int16, from a file of :func:`write_wav`."""
    return soundfile.read(path, dtype="int16")[0]


def is_whole_wav(path: Path, config: AudioConfig) -> bool:
    """Whether the file is a complete sound of the model's rate and length."""
    try:
        wave, rate = soundfile.read(path, dtype="int16")
    except (soundfile.LibsndfileError, OSError):
        return False
    return wave.shape == (config.length,) and rate == config.sample_rate
