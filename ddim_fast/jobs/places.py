"""Which output of a sampling job lies at a path."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.pictures import check_channels
from .outputs import Batches, NpzFile, Output, PngFolder

if TYPE_CHECKING:
    from ..models.audio import AudioConfig

__all__ = ["free_folder", "output_at"]

# Whoever gives --out one of these does not mean a folder.
_FILES = {".zip", ".npy", ".pt", ".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".mp4", ".wav"}


def output_at(path: Path, batches: Batches, audio: AudioConfig | None) -> Output:
    """A folder of sounds where the images are some, otherwise an .npz file or a folder of pictures.

    Raises:
        ValueError: these images cannot be there.
    """
    if audio is not None:
        from .sound_outputs import WavFolder

        return WavFolder(path, batches, audio)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzFile(path, batches)
    if suffix in _FILES:
        raise ValueError(f"--out {path} would be a folder of that name; give a folder, or for images an .npz file")
    check_channels(batches.image_shape[2], "--out FILE.npz holds them as they are")
    return PngFolder(path, batches)


def free_folder(batches: Batches, audio: AudioConfig | None, settings: dict[str, Any]) -> Path:
    """The folder of a run that names none: an unfinished one with these settings, or else the next that holds no images."""
    number = 0
    while True:
        number += 1
        folder = output_at(Path("samples" if number == 1 else f"samples-{number}"), batches, audio)
        with contextlib.suppress(ValueError):
            record = folder.record()
            folder.check(record, settings)
            if record is None or not record["finished"]:
                return folder.path
