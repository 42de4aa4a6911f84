"""Recordings, and what models make of them."""

import numpy as np

from ddim_fast.models.audio import AudioConfig

RATE = 4000
MEL = AudioConfig(kind="mel", sample_rate=RATE, length=2048, fold=2, n_fft=256, hop=128, mels=16)
WAVEFORM = AudioConfig(kind="waveform", sample_rate=RATE, length=2048, fold=8, n_fft=256, hop=128, mels=16)


def tone(hertz: float, samples: int = 2048, rate: int = RATE) -> np.ndarray:
    """A tone that swells and fades, (samples,) float32."""
    time = np.arange(samples) / rate
    return (0.5 * np.hanning(samples) * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
