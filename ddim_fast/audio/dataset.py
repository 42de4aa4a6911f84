"""Sounds as training data."""

from __future__ import annotations

import dataclasses

import torch

from ..models.audio import AudioConfig
from ..training.data import ImageSet
from .codec import make_codec
from .reading import load_sounds

__all__ = ["load_sound_images"]


def load_sound_images(spec: str, audio: AudioConfig, *, labelled: bool, convert: bool = False) -> tuple[ImageSet, AudioConfig]:
    """Sounds as the images that a network is trained on, and ``audio`` with the names of their classes.

    Args:
        spec, convert: as of :func:`load_sounds`, errors too.
        labelled: whether the classes are wanted; they are numbered in the order of their names.
    """
    sounds = load_sounds(spec, audio, convert)
    images = make_codec(audio).encode(sounds.waves)
    if not labelled or sounds.labels is None:
        return ImageSet(images, None), audio
    names = sorted(set(sounds.labels))
    numbers = torch.tensor([names.index(label) for label in sounds.labels])
    return ImageSet(images, numbers), dataclasses.replace(audio, labels=tuple(names))
