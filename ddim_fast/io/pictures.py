"""Pictures from tensors and arrays: single images, grids and films."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_channels", "image_format", "image_grid", "save_gif", "save_image", "to_uint8"]


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """(..., C, H, W) in [-1, 1] -> (..., H, W, C) uint8 on the host, values outside clipped.

    Raises:
        ValueError: a number is infinite or none, as where a network overflows in float16.
    """
    floats: Any = images.astype(np.float32) if isinstance(images, np.ndarray) else images.detach().float()
    if not (abs(floats) < np.inf).all():
        raise ValueError("the images are not finite; try --dtype float32")
    if isinstance(floats, np.ndarray):
        pixels = ((floats.clip(-1, 1) + 1) * np.float32(127.5)).round().astype(np.uint8)
    else:
        pixels = (floats.clamp(-1, 1) + 1).mul(127.5).round().byte().cpu().numpy()
    return np.moveaxis(pixels, -3, -1)


def image_grid(images: Tensor | np.ndarray, columns: int = 10, gap: int = 2) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> one (height, width, C) uint8 picture, ``columns`` images a row on white.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one image")
    pictures = to_uint8(images)
    count, height, width, channels = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def save_image(path: Path, picture: np.ndarray, scale: int = 1) -> None:
    """Write an (H, W, C) uint8 picture, each pixel ``scale`` pixels wide, in the format of the file's suffix.

    Raises:
        ValueError: the suffix names no image format.
    """
    buffer = io.BytesIO()
    _enlarged(picture, scale).save(buffer, format=image_format(path))
    atomic_write(path, buffer.getvalue())


def save_gif(path: Path, frames: Sequence[np.ndarray], scale: int = 1, milliseconds: int = 80, hold: int = 2000) -> None:
    """Write (H, W, C) uint8 frames as a GIF that loops, its last frame shown for ``hold`` milliseconds."""
    first, *rest = (_enlarged(frame, scale) for frame in frames)
    buffer = io.BytesIO()
    durations = [milliseconds] * len(rest) + [hold]
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
    atomic_write(path, buffer.getvalue())


def _enlarged(picture: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def check_channels(channels: int, instead: str) -> None:
    """See that images can be written as pictures.

    Raises:
        ValueError: pictures do not have so many channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels are no pictures, which have 1 or 3; {instead}")


def image_format(path: Path) -> str:
    """Pillow's name of the format that a file's suffix means.

    Raises:
        ValueError: it means none.
    """
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: unknown image format; name a .png file")
    return formats[path.suffix.lower()]
