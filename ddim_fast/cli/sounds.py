"""Sounds as the commands deal with them."""

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

__all__ = ["Sounds"]


class Sounds:
    """Images that are sounds; a :class:`ddim_fast.cli.modality.Medium`.

    Args:
        audio: what the images mean.
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

    def load_labelled(self, specs: Sequence[str], label: str | None) -> tuple[Tensor, Tensor | None, list[str]]:
        """The images of several data sets or files, their classes, and names for what is made of them.

        Args:
            label: the class of all, or "none" for no class; None for that of each, where the data names it.

        Returns:
            (N, C, H, W) float32, (N,) int64 or None, and N names.

        Raises:
            ValueError: a class is not the model's, or as of :func:`load_sounds`.
        """
        sets = [self.read(spec) for spec in specs]
        images = self.codec.encode(np.concatenate([part.waves for part in sets]))
        called = item_names([place for part in sets for place in part.places])
        unknown = self._audio.labels is None or any(part.labels is None for part in sets)
        if label == "none" or (label is None and unknown):
            return images, None, called
        names = [label] * len(images) if label is not None else [name for part in sets for name in part.labels or ()]
        return images, torch.tensor([self.label(name) for name in names]), called

    def label(self, text: str) -> int:
        numbers, labels = self._audio.class_numbers(text), self._audio.labels or ()
        if len(numbers) > 1:
            names = ", ".join(labels[number] for number in numbers)
            raise ValueError(f"{text!r} means {len(numbers)} classes; name one of {names}")
        return numbers[0]

    def shown(self, images: Tensor) -> Tensor:
        return self.codec.spectrograms(images)

    def write(self, folder: Path, names: Sequence[str], images: Tensor) -> None:
        for name, wave in zip(names, to_int16(self.codec.decode(images)), strict=True):
            write_wav(folder / f"{name}.wav", wave, self._audio.sample_rate)
