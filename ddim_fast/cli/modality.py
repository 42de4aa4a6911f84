"""The modality of a network's images: pictures or sounds, read from files and written to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..data.resizing import Resizer
from ..io.pictures import check_channels, save_image, to_uint8
from .samplers import audio_of

if TYPE_CHECKING:
    from torch import Tensor

    from .samplers import AnySampler

__all__ = ["Medium", "Pictures", "medium_of"]


class Medium(Protocol):
    """Reading, writing and showing images, (N, C, H, W) float32 in [-1, 1].

    Attributes:
        noun: their name, in the plural.
        width: the approximate width of a small one when shown, in pixels.
    """

    noun: str
    width: int

    def load(self, spec: str) -> Tensor:
        """The images of files, resized to the network's size, on the host."""
        ...

    def shown(self, images: Tensor) -> Tensor:
        """A picture of each image for people, (N, C', H', W') in [-1, 1]."""
        ...

    def write(self, folder: Path, names: Sequence[str], images: Tensor) -> None:
        """Write one file each, NAME.png or NAME.wav."""
        ...


class Pictures:
    """Images that are pictures.

    Args:
        image_shape: (C, H, W) of the network's images.
        resize: the way to resize pictures of other sizes, one of :data:`ddim_fast.data.resizing.RESIZES`.

    Attributes:
        resizer: resizes loaded pictures, and counts them.
    """

    noun, width = "images", 64

    def __init__(self, image_shape: tuple[int, int, int], resize: str) -> None:
        check_channels(image_shape[0], "sample them with --out FILE.npz")
        self._channels, self.resizer = image_shape[0], Resizer(image_shape[1], resize)

    def load(self, spec: str) -> Tensor:
        from ..data.images import load_images, to_unit_range

        data = load_images(spec, self._channels, self.resizer.size, labelled=False, resizer=self.resizer)
        return to_unit_range(data.images).contiguous()

    def shown(self, images: Tensor) -> Tensor:
        return images

    def write(self, folder: Path, names: Sequence[str], images: Tensor) -> None:
        for name, picture in zip(names, to_uint8(images), strict=True):
            save_image(folder / f"{name}.png", picture)


def medium_of(sampler: AnySampler, convert: bool = False, resize: str = "crop") -> Medium:
    """The modality of a sampler's images; ``convert`` as of :func:`ddim_fast.data.sound_files.load_sounds`, ``resize`` as of
    :class:`Pictures`."""
    audio = audio_of(sampler)
    if audio is None:
        return Pictures(sampler.image_shape, resize)
    from .sounds import Sounds

    return Sounds(audio, convert)
