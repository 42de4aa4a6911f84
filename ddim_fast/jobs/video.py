"""A film with new frames between every two given ones, written in batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import to_unit_range
from ..data.resizing import fit_image
from ..diffusion.interpolation import between_all
from ..diffusion.latent import LatentSampler
from ..diffusion.sampler import Sampler
from ..io.pictures import to_uint8
from ..io.stopping import signals
from .outputs import Batches, PngFolder
from .video_files import read_frames

__all__ = ["VideoJob", "scan_frames"]


def scan_frames(source: Path) -> tuple[int, str, tuple[int, int]]:
    """The number of frames of a film, a checksum of their pixels, and their (width, height).

    Raises:
        ValueError: there are fewer than two, or they differ in size.
    """
    digest, size, count = hashlib.sha256(), (0, 0), 0
    for count, frame in enumerate(read_frames(source), start=1):
        size = frame.size if count == 1 else size
        if frame.size != size:
            raise ValueError(
                f"the frames of a film must have one size; in {source} the first is {size[0]}x{size[1]}, and frame {count} is "
                f"{frame.size[0]}x{frame.size[1]}"
            )
        digest.update(repr((frame.mode, frame.size)).encode() + frame.tobytes())
    if count < 2:
        raise ValueError(f"a film needs at least two frames; {source} has {count}")
    return count, digest.hexdigest(), size


@dataclass(frozen=True)
class VideoJob:
    """The frames of a film, and ``factor`` - 1 new ones after each but the last. At most one batch is in memory.

    Attributes:
        sampler: a deterministic sampler, which encodes the given frames and makes the new ones.
        source: a source of :func:`ddim_fast.jobs.video_files.read_frames`. Frames are resized to the model's size by ``resize``
            and otherwise unchanged.
        count: its number of frames.
        factor: 2 or more.
        batch_size: images per network call.
        exact: see :meth:`ddim_fast.Sampler.encode`.
        label: the class of all frames, or None.
        guidance: scale of classifier-free guidance, or None.
        resize: as of :func:`ddim_fast.data.resizing.fit_image`.
    """

    sampler: Sampler | LatentSampler
    source: Path
    count: int
    factor: int
    batch_size: int
    exact: bool
    label: int | None
    guidance: float | None
    resize: str

    @property
    def batches(self) -> Batches:
        """All frames of the new film. The first of a batch is a given one."""
        channels, height, width = self.sampler.image_shape
        frames = range((self.count - 1) * self.factor + 1)
        return Batches(frames, None, self._pairs * self.factor, (height, width, channels))

    def run(self, ks: Sequence[int], output: PngFolder, on_batch: Callable[[int], None]) -> None:
        """Make batches and write them to ``output``; each frame is encoded once.

        Args:
            ks: the batches.
            output: where they go.
            on_batch: called with the number of each batch when it is written.

        Raises:
            ValueError: new frames are not finite.
        """
        channels, size, _ = self.sampler.image_shape
        frames = (fit_image(frame, channels, size, self.resize) for frame in read_frames(self.source))
        following, latent = [next(frames)], None
        for k in signals.each(range(max(ks, default=-1) + 1), "batch"):
            given = following + list(itertools.islice(frames, self._pairs))
            following = given[-1:]
            if k not in ks:
                latent = None
                continue
            pictures = np.moveaxis(np.stack(given), 1, -1)
            if len(given) > 1:
                new = self._encoded(given if latent is None else given[1:])
                latents = new if latent is None else torch.cat([latent, new])
                latent = latents[-1:]
                pictures = self._joined(pictures, latents)
            # The last given frame is the first of the next batch, if there is one.
            output.write(k, pictures[: len(self.batches[k][0])])
            on_batch(k)

    @property
    def _pairs(self) -> int:
        """The number of consecutive given frames in a batch."""
        return max(1, self.batch_size // self.factor)

    def _encoded(self, frames: list[np.ndarray]) -> Tensor:
        images = to_unit_range(torch.from_numpy(np.stack(frames))).contiguous()
        return self.sampler.encode(images, labels=self.label, guidance=self.guidance, exact=self.exact).cpu()

    def _joined(self, given: np.ndarray, latents: Tensor) -> np.ndarray:
        """The given (n, H, W, C) frames, and new frames between them, made from their noise."""
        between = self.sampler.sample(
            x_T=between_all(latents, self.factor), labels=self.label, guidance=self.guidance, batch_size=self.batch_size
        )
        made = to_uint8(between).reshape(len(given) - 1, self.factor - 1, *given.shape[1:])
        return np.concatenate([np.concatenate([given[:-1, None], made], axis=1).reshape(-1, *given.shape[1:]), given[-1:]])
