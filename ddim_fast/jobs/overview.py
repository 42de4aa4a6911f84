"""Pictures that show a sampling job: a grid of its first images, and a film of how they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..io.pictures import image_grid, save_gif, save_image
from .sampling import JobStep

if TYPE_CHECKING:
    from torch import Tensor

    from .outputs import Output

__all__ = ["GRID_IMAGES", "Film", "save_grid"]

# More images are unreadable in one grid.
GRID_IMAGES = 60


def save_grid(path: Path, output: Output) -> None:
    """The first images of an output that holds them all."""
    images = output.preview(GRID_IMAGES)
    save_image(path, image_grid(images), _scale(images))


class Film:
    """The steps of the first batch, from noise to images, written when the last one is made."""

    def __init__(self, path: Path, steps: int, shown: Callable[[Tensor], Tensor]) -> None:
        self._path, self._steps, self._shown = path, steps, shown
        self._frames: list[np.ndarray] = []

    def add(self, step: JobStep) -> None:
        """One more frame. Of a batch that memory does not hold, the film shows the part that is made first."""
        if step.call > 0:
            return
        if step.state.step == 0:
            self._frames.clear()
        images = self._shown(step.state.x[:GRID_IMAGES])
        self._frames.append(image_grid(images))
        if step.state.step == self._steps - 1:
            save_gif(self._path, self._frames, _scale(images))


def _scale(images: Tensor | np.ndarray) -> int:
    """How many pixels wide a pixel of small (N, C, H, W) images is shown."""
    return max(1, 64 // images.shape[2])
