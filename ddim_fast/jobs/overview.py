"""Overview pictures of a sampling job: a grid of its first images, and a film of its first batch."""

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
    """The first images of a complete output."""
    images = output.preview(GRID_IMAGES)
    save_image(path, image_grid(images), _scale(images))


class Film:
    """The film of the first batch, from noise to images, written after its last step."""

    def __init__(self, path: Path, steps: int, shown: Callable[[Tensor], Tensor]) -> None:
        self._path, self._steps, self._shown = path, steps, shown
        self._frames: list[np.ndarray] = []

    def add(self, step: JobStep) -> None:
        """Add a frame. If memory does not hold the whole batch, the film shows its first part."""
        if step.call > 0:
            return
        if step.state.step == 0:
            self._frames.clear()
        images = self._shown(step.state.x[:GRID_IMAGES])
        self._frames.append(image_grid(images))
        if step.state.step == self._steps - 1:
            save_gif(self._path, self._frames, _scale(images))


def _scale(images: Tensor | np.ndarray) -> int:
    """The enlargement of small (N, C, H, W) images for people."""
    return max(1, 64 // images.shape[2])
