"""Sounds as training data."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..audio.codec import make_codec
from ..models.audio import AudioConfig
from .images import ImageSet
from .sound_files import load_sounds

__all__ = ["load_sound_images"]


def load_sound_images(
    spec: str,
    audio: AudioConfig,
    *,
    labelled: bool,
    class_names: Sequence[str] | None = None,
    convert: bool = False,
    max_bad: int = 0,
) -> ImageSet:
    """Read sounds as the images that a network is trained on.

    Args:
        spec, convert, max_bad: as of :func:`load_sounds`.
        audio: the sound format of the images.
        labelled: whether to read the classes.
        class_names: the network's classes, by number; None numbers the data's classes in the order of their names.

    Raises:
        ValueError: as of :func:`load_sounds`, or the network lacks a class.
    """
    sounds = load_sounds(spec, audio, convert, max_bad)
    images = make_codec(audio).encode(sounds.waves)
    if not labelled or sounds.labels is None:
        return ImageSet(images, None, sounds.places, left_out=sounds.left_out)
    names = tuple(class_names or sorted(set(sounds.labels)))
    for label in sounds.labels:
        if label not in names:
            raise ValueError(f"{spec}: class {label!r} is not one of the model's: {', '.join(names)}")
    numbers = torch.tensor([names.index(label) for label in sounds.labels])
    return ImageSet(images, numbers, sounds.places, names, left_out=sounds.left_out)
