"""Resizing pictures to a network's size, and the line that reports it."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image

__all__ = ["RESIZES", "Resizer", "fit_image"]

# Ways to resize a picture to a square.
RESIZES = ("crop", "pad", "stretch")


def fit_image(
    image: Image.Image,
    channels: int,
    size: int,
    how: str = "crop",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """(channels, size, size) uint8: a picture in a network's size and colours.

    Args:
        channels: 1 or 3.
        how: "crop", as for training data: the central square, resized; a picture with a side of ``size`` or less stays
            unchanged in the middle of a black frame (28x28 -> 32x32). "pad": the whole picture, resized to fit a black frame.
            "stretch": the whole picture, resized without regard to its proportions.
        resample: the filter.
    """
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    width, height = image.size
    side = min(width, height)
    if how == "crop" and side > size:
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), resample)
    elif how == "pad":
        longer = max(width, height)
        within = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
        image = image if image.size == within else image.resize(within, resample)
    elif how == "stretch" and image.size != (size, size):
        image = image.resize((size, size), resample)
    if image.size != (size, size):
        frame = Image.new(image.mode, (size, size))
        frame.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = frame
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


class Resizer:
    """Resizes pictures to one size, and counts those of another.

    Args:
        size: pixels each way.
        how: one of :data:`RESIZES`, as of :func:`fit_image`; None for training data, which are always cropped.

    Raises:
        ValueError: ``how`` is unknown.
    """

    def __init__(self, size: int, how: str | None = None) -> None:
        if how not in (None, *RESIZES):
            raise ValueError(f"--resize {how}: there are {', '.join(RESIZES)}")
        self.size, self.how = size, how
        self._first = ""
        self._done: Counter[str] = Counter()

    def fit(self, place: str, image: Image.Image, channels: int) -> np.ndarray:
        """:func:`fit_image` of a picture from ``place``."""
        self.note(place, image.size)
        return fit_image(image, channels, self.size, self.how or "crop")

    def note(self, place: str, size: tuple[int, int]) -> None:
        """Count a picture, or a film, of (width, height)."""
        if size != (self.size, self.size):
            self._first = self._first or f"{place}, {size[0]}x{size[1]},"
            self._done[self._way(*size)] += 1

    @property
    def line(self) -> str | None:
        """How pictures of another size were resized, in one line; None where there were none."""
        count = self._done.total()
        if not count:
            return None
        which = f"{self._first} was" if count == 1 else f"{count} images were"
        done = ", ".join(self._done) if len(self._done) == 1 else ", ".join(f"{n} {way}" for way, n in self._done.items())
        return f"{which} brought to {self.size}x{self.size}: {done}" + (
            " (--resize names another way)" if self.how is not None else ""
        )

    def _way(self, width: int, height: int) -> str:
        """How :func:`fit_image` resizes a picture of this size, in words."""
        if self.how == "stretch":
            return "resized" if width == height else "stretched"
        if self.how == "pad":
            return "resized" if width == height else "resized into a black frame"
        if min(width, height) > self.size:
            return "resized" if width == height else "cropped to a square in the middle and resized"
        return "put into a black frame" if max(width, height) <= self.size else "its middle put into a black frame"
