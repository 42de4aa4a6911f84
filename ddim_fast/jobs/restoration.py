"""A restoration job: batches of restored images written to disk, with measures of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..diffusion.degradations import LinearOperator
from ..diffusion.latent import LatentSampler
from ..diffusion.restoration import inconsistency
from ..diffusion.sampler import Sampler
from ..evaluation.fidelity import peak_signal_to_noise, structural_similarity
from ..io.pictures import image_grid, to_uint8
from .outputs import Batches, PngFolder

__all__ = ["RestorationJob"]

# More images are unreadable in one grid.
_SHOWN = 20


@dataclass(frozen=True)
class RestorationJob:
    """Degraded images, each to be restored once per seed.

    Attributes:
        sampler: the sampler that restores them.
        operator: their degradation.
        steps: options of :meth:`ddim_fast.Sampler.restoration_steps`.
        guidance: scale of classifier-free guidance, or None.
        measurement: the degraded images, as the operator returns them.
        truth: (N, H, W, C) uint8, the original images, or None if unknown.
        image: the number of the degraded image, for each restored one.
        names: names of the restored images.
        batches: their seeds and labels.
    """

    sampler: Sampler | LatentSampler
    operator: LinearOperator
    steps: dict[str, Any]
    guidance: float | None
    measurement: Tensor
    truth: np.ndarray | None
    image: Sequence[int]
    names: Sequence[str]
    batches: Batches

    def __post_init__(self) -> None:
        self.operator.to(self.sampler.device)

    def restore(self, k: int, output: PngFolder) -> None:
        """Restore batch k and write its pictures to ``output``, after the measures of each, by name, in the record. They are
        ``inconsistency``, the largest ``|A x - y|``; ``inconsistency_of_file``, after rounding to 8 bits; and, with a known
        truth, ``psnr`` and ``ssim`` of the rounded pictures, and both ``_of_pseudo_inverse``.

        Raises:
            ValueError: the images are not finite.
        """
        seeds, labels = self.batches[k]
        count, measurement = len(seeds), self.measurement[self.image[self.batches.part(k)]]
        # Compiled code is for one batch size: a smaller last batch is filled up with its last image.
        size = self.batches.size if self.sampler.needs_one_batch_size else count
        which = [min(i, count - 1) for i in range(size)]
        restored = self.sampler.restore(
            measurement[which],
            self.operator,
            seeds=[seeds[i] for i in which],
            labels=None if labels is None else [labels[i] for i in which],
            guidance=self.guidance,
            **self.steps,
        )[:count]
        if not restored.isfinite().all():
            raise ValueError("the restored images are not finite; try --dtype float32")
        rounded = self.operator.rounded(restored)
        pictures, names = to_uint8(rounded), self.names[self.batches.part(k)]
        figures = {
            "inconsistency": inconsistency(self.operator, restored, measurement).tolist(),
            "inconsistency_of_file": inconsistency(self.operator, rounded, measurement).tolist(),
            **self._fidelity(k, pictures),
        }
        rows = (dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True))
        output.note(images={**output.begun()["images"], **dict(zip(names, rows, strict=True))})
        output.write(k, pictures)

    def finish(self, output: PngFolder) -> dict[str, float]:
        """Finish the record with the mean of each measure, or the largest inconsistency; returns these."""
        images = output.begun()["images"]
        rows = [images[name] for name in self.names]
        means = {name: (max if name.startswith("inconsistency") else np.mean)([row[name] for row in rows]) for name in rows[0]}
        means = {name: float(mean) for name, mean in means.items()}
        output.note(overall=means, finished=True)
        return means

    def comparison(self, output: PngFolder) -> np.ndarray:
        """(height, width, C) uint8, a row each of the first images: degraded (if that is a picture of its own), by the
        pseudo-inverse alone, restored, and original (if known)."""
        shown = slice(0, _SHOWN)
        given, seen = self.measurement[self.image[shown]], self._pseudo_inverse(shown).cpu()
        rows = [seen] if given.shape != seen.shape or torch.equal(given, seen) else [given, seen]
        batches = range(min(len(self.batches), -(-_SHOWN // self.batches.size)))
        pictures = [np.concatenate([output.read(k) for k in batches])[shown]]
        if self.truth is not None:
            pictures.append(self.truth[self.image[shown]])
        sheet = np.concatenate([*map(to_uint8, rows), *pictures])
        return image_grid(np.moveaxis(sheet, -1, 1) / np.float32(127.5) - 1, columns=len(given))

    def _fidelity(self, k: int, pictures: np.ndarray) -> dict[str, list[float]]:
        if self.truth is None:
            return {}
        part = self.batches.part(k)
        truth, baseline = self.truth[self.image[part]], to_uint8(self._pseudo_inverse(part))
        return {
            "psnr": peak_signal_to_noise(pictures, truth).tolist(),
            "psnr_of_pseudo_inverse": peak_signal_to_noise(baseline, truth).tolist(),
            "ssim": structural_similarity(pictures, truth).tolist(),
            "ssim_of_pseudo_inverse": structural_similarity(baseline, truth).tolist(),
        }

    def _pseudo_inverse(self, part: slice) -> Tensor:
        """(n, C, H, W): the pseudo-inverse of the degraded images, without a network."""
        return self.operator.pseudo_inverse(self.measurement[self.image[part]].to(self.sampler.device))
