"""The output of a sampling job of sounds: a folder of WAV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from ..audio.codec import make_codec
from ..audio.wav import is_whole_wav, read_wav, to_int16, write_wav
from ..io.records import SPECTROGRAMS
from ..models.audio import AudioConfig
from .outputs import Batches, FileFolder

__all__ = ["WavFolder"]


class WavFolder(FileFolder):
    """A folder with one 16-bit WAV per seed.

    Raises:
        ValueError: its name is one of a file of images, or a seed is named twice.
    """

    suffix, overview, noun = ".wav", SPECTROGRAMS, "sounds"

    def __init__(self, path: Path, batches: Batches, audio: AudioConfig) -> None:
        if path.suffix.lower() == ".npz":
            raise ValueError(f"--out {path}: a .npz file holds images; name a folder for the model's sounds")
        super().__init__(path, batches)
        self._audio, self._codec = audio, make_codec(audio)

    def convert(self, images: Tensor) -> np.ndarray:
        """(n, length) int16"""
        return to_int16(self._codec.decode(images))

    def shown(self, images: Tensor) -> Tensor:
        return self._codec.spectrograms(images)

    def preview(self, count: int) -> np.ndarray:
        return self.shown(self._codec.encode(self._first(count) / np.float32(32767))).numpy()

    def is_whole(self, k: int, file: Path) -> bool:
        return is_whole_wav(file, self._audio)

    def write(self, k: int, items: np.ndarray) -> None:
        for file, wave in zip(self.files(k), items, strict=True):
            write_wav(file, wave, self._audio.sample_rate)

    def read(self, k: int) -> np.ndarray:
        return np.stack([read_wav(file) for file in self.files(k)])
