"""Reading, writing and showing sounds in the commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..audio.codec import make_codec
from ..audio.wav import to_int16, write_wav
from ..data.sound_files import SoundSet, load_sounds
from ..io.files import item_names
from ..models.audio import AudioConfig
from ..models.config import UNetConfig
from .options import image_labels

__all__ = ["Sounds"]


class Sounds:
    """Images that represent sounds; a :class:`ddim_fast.cli.modality.Medium`.

    Args:
        audio: the sound format of the images.
        convert: as of :func:`load_sounds`.
    """

    noun, width = "sounds", 128

    def __init__(self, audio: AudioConfig, convert: bool = False) -> None:
        self._audio, self._convert = audio, convert
        self.codec = make_codec(audio)

    def read(self, spec: str) -> SoundSet:
        """The sounds themselves; errors as of :func:`load_sounds`."""
        return load_sounds(spec, self._audio, self._convert)

    def load(self, spec: str) -> Tensor:
        return self.codec.encode(self.read(spec).waves)

    def load_labelled(
        self, specs: Sequence[str], chosen: str | None, config: UNetConfig, option: str = "--class"
    ) -> tuple[Tensor, Tensor | None, list[str]]:
        """The images of several data sets or files, their classes, and names for the results.

        Args:
            chosen, config, option: as of :func:`image_labels`; a recording's own class is the one that its data names.

        Returns:
            (N, C, H, W) float32, (N,) int64 or None, and N names.

        Raises:
            ValueError: the model lacks a class, or as of :func:`load_sounds`.
        """
        sets = [self.read(spec) for spec in specs]
        images = self.codec.encode(np.concatenate([part.waves for part in sets]))
        own: list[int | None] = [None] * len(images)
        if chosen is None and config.class_names is not None and all(part.labels is not None for part in sets):
            own = [config.class_number(name) for part in sets for name in part.labels or ()]
        labels = image_labels(chosen, own, config, option)
        names = item_names([place for part in sets for place in part.places])
        return images, None if labels is None else torch.tensor(labels), names

    def shown(self, images: Tensor) -> Tensor:
        return self.codec.spectrograms(images)

    def write(self, folder: Path, names: Sequence[str], images: Tensor) -> None:
        for name, wave in zip(names, to_int16(self.codec.decode(images)), strict=True):
            write_wav(folder / f"{name}.wav", wave, self._audio.sample_rate)
