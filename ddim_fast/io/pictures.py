"""Pictures from tensors and arrays: single images, grids and films."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .files import atomic_write, numbers

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "check_channels",
    "check_floats",
    "image_format",
    "image_grid",
    "save_gif",
    "save_image",
    "save_images",
    "to_pil",
    "to_uint8",
]


def to_uint8(images: Tensor | np.ndarray) -> np.ndarray:
    """(..., C, H, W) in [-1, 1] -> (..., H, W, C) uint8 on the host, values outside clipped.

    Raises:
        ValueError: a value is NaN or infinite, as where a network overflows in float16.
    """
    floats: Any = images.astype(np.float32) if isinstance(images, np.ndarray) else images.detach().float()
    if not (abs(floats) < np.inf).all():
        raise ValueError("the images are not finite; try dtype float32 (--dtype float32)")
    if isinstance(floats, np.ndarray):
        pixels = ((floats.clip(-1, 1) + 1) * np.float32(127.5)).round().astype(np.uint8)
    else:
        pixels = (floats.clamp(-1, 1) + 1).mul(127.5).round().byte().cpu().numpy()
    return np.moveaxis(pixels, -3, -1)


def image_grid(images: Tensor | np.ndarray, columns: int = 10, gap: int = 2) -> np.ndarray:
    """(N, C, H, W) in [-1, 1] -> one (height, width, C) uint8 picture, ``columns`` images per row on white.

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


def to_pil(images: Tensor | np.ndarray) -> list[Image.Image]:
    """Pillow's images, grey or RGB, of floating-point images in [-1, 1]; values outside are clipped.

    Args:
        images: (N, C, H, W), or (C, H, W) for one image, of 1 or 3 channels.

    Raises:
        ValueError: they are of another shape or dtype, or a value is NaN or infinite.
    """
    return [_enlarged(picture, 1) for picture in to_uint8(_checked(images))]


def save_images(images: Tensor | np.ndarray, path: str | os.PathLike[str]) -> list[Path]:
    """Write images as files, replacing those of the same names.

    Args:
        images: as of :func:`to_pil`.
        path: a folder for ``0.png``, ``1.png`` and so on, with the digits of the last number, created if it is missing; or an
            image file, such as ``a.png``, for one image, or for all in a grid of ten columns.

    Returns:
        The files, in order.

    Raises:
        ValueError: as of :func:`to_pil`; or the file's suffix names no image format, or there is no image for it.
    """
    images, path = _checked(images), Path(path)
    if path.suffix and not path.is_dir():
        image_format(path)  # refused before a folder is created
        picture = to_uint8(images)[0] if len(images) == 1 else image_grid(images)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(path, picture)
        return [path]
    pictures = to_uint8(images)
    path.mkdir(parents=True, exist_ok=True)
    paths = [path / f"{number}.png" for number in numbers(len(pictures))]
    for file, picture in zip(paths, pictures, strict=True):
        save_image(file, picture)
    return paths


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


def _checked(images: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """(N, C, H, W) images, checked to be pictures, from (N, C, H, W) or a single (C, H, W)."""
    if getattr(images, "ndim", None) not in (3, 4):
        got = f"shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
        raise ValueError(f"images are a tensor or an array of shape (N, C, H, W) or (C, H, W); got {got}")
    check_floats(images)
    check_channels(images.shape[-3], "images are of shape (N, C, H, W) or (C, H, W)")
    return images[None] if images.ndim == 3 else images


def check_floats(images: Tensor | np.ndarray) -> None:
    """Check that images are floating-point: 8-bit pixels would pass for values far outside [-1, 1].

    Raises:
        ValueError: they are of an integer, a boolean or a complex dtype.
    """
    if images.dtype.kind not in "biuc" if isinstance(images, np.ndarray) else images.is_floating_point():
        return
    raise ValueError(
        f"images are floating-point numbers in [-1, 1], and noise is floating-point; got {images.dtype}: "
        "convert 8-bit images by images / 127.5 - 1"
    )


def check_channels(channels: int, instead: str) -> None:
    """Check that images can be written as pictures.

    Raises:
        ValueError: they have another number of channels than pictures.
    """
    if channels not in (1, 3):
        raise ValueError(f"images of {channels} channels are no pictures, which have 1 or 3; {instead}")


def image_format(path: Path) -> str:
    """Pillow's name of the format of a file's suffix.

    Raises:
        ValueError: the suffix is unknown.
    """
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: unknown image format; name a .png file")
    return formats[path.suffix.lower()]
