"""Linear degradation operators, which restoration inverts.

Each has its pseudo-inverse A^+, with A A^+ A = A: A^+ A projects an image onto the part that A measures.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.scalars import is_finite, is_whole, plain

__all__ = ["Blur", "CompressedSensing", "Downscale", "Grey", "LinearOperator", "Mask"]

# Half the steps between the 8-bit levels of [-1, 1].
_HALF = 127.5


class LinearOperator(nn.Module):
    """A, applied by a call; its tensors are buffers, which ``.to(device)`` moves.

    Attributes:
        gain: the standard deviation of a pixel of A^+ n for noise n of variance 1: root mean square over the measured pixels.
    """

    gain: float = 1.0

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> N measurements."""

    @abstractmethod
    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        """N measurements -> (N, C, H, W)."""

    def rounded(self, images: Tensor) -> Tensor:
        """(N, C, H, W) rounded to 8-bit levels of [-1, 1], keeping A of the images if the operator can. By default each value
        goes to the nearest level, so 8-bit values that A copies stay unchanged."""
        return images.clamp(-1, 1).add(1).mul(_HALF).round().div(_HALF).sub(1)


class Mask(LinearOperator):
    """Inpainting: keeps the known pixels; the others are 0 in the measurement.

    Args:
        known: (H, W), True where the image is known; or (C, H, W) if its channels differ.

    Raises:
        ValueError: it has another number of dimensions.
    """

    known: Tensor

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        if known.ndim not in (2, 3):
            raise ValueError(f"a mask has the shape (H, W) or (C, H, W) of an image; got {tuple(known.shape)}")
        self.register_buffer("known", known.float())

    @classmethod
    def outside(cls, size: tuple[int, int], rectangles: Sequence[tuple[int, int, int, int]]) -> Mask:
        """A mask whose unknown pixels are some rectangles.

        Args:
            size: height and width of the images.
            rectangles: left, top, width and height of each, in pixels.

        Raises:
            ValueError: a rectangle is empty, or leaves the image.
        """
        known = torch.ones(size, dtype=torch.bool)
        for left, top, width, height in rectangles:
            inside = left >= 0 and top >= 0 and left + width <= size[1] and top + height <= size[0]
            if not inside or width < 1 or height < 1:
                raise ValueError(
                    f"the rectangle {left},{top},{width},{height} (left, top, width, height) does not lie in an image of "
                    f"{size[1]} pixels by {size[0]}"
                )
            known[top : top + height, left : left + width] = False
        return cls(known)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-self.known.ndim :] != self.known.shape:
            raise ValueError(f"a mask of shape {tuple(self.known.shape)} does not fit images of shape {tuple(images.shape)}")
        return images * self.known

    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        return self(measurement)


class Downscale(LinearOperator):
    """Super-resolution: the mean of each square of ``factor`` x ``factor`` pixels.

    Raises:
        ValueError: the factor is not a whole number above 1, or, in a call, does not divide the image's sides.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        factor = plain(factor)
        if not is_whole(factor) or factor < 2:
            raise ValueError(f"a scale factor is a whole number of 2 or more; got {factor!r}")
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        if any(side % self.factor for side in images.shape[-2:]):
            raise ValueError(f"images of {_size(images)} pixels cannot be divided by the scale factor {self.factor}")
        return F.avg_pool2d(images, self.factor)

    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        return F.interpolate(measurement, scale_factor=self.factor, mode="nearest")

    def rounded(self, images: Tensor) -> Tensor:
        """Squares keep their means, exactly for means of 8-bit images. First comes the nearest image in [-1, 1] with these
        means, by a shift of each square and clipping. Then the pixels with the largest remainders are rounded up, as many as
        the square's sum needs."""
        pixels = F.pixel_unshuffle(images.double(), self.factor).unflatten(1, (images.shape[1], -1))  # dimension 2: a square
        mean = pixels.mean(2, keepdim=True).clamp(-1, 1)
        # The mean after clipping grows with the shift; the shift lies between those that make all pixels -1 or 1.
        low, high = -1 - pixels.amax(2, keepdim=True), 1 - pixels.amin(2, keepdim=True)
        for _ in range(60):
            shift = (low + high) / 2
            below = (pixels + shift).clamp(-1, 1).mean(2, keepdim=True) < mean
            low, high = torch.where(below, shift, low), torch.where(below, high, shift)
        levels = ((pixels + high).clamp(-1, 1) + 1) * _HALF
        down = levels.floor()
        ups = ((mean + 1) * (_HALF * self.factor**2)).round() - down.sum(2, keepdim=True)
        rank = (levels - down).argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        rounded = (down + (rank < ups)) / _HALF - 1
        return F.pixel_shuffle(rounded.flatten(1, 2), self.factor).to(images)


class Grey(LinearOperator):
    """Colorization: the mean of the ``channels``, (N, 1, H, W).

    Raises:
        ValueError: there is only one channel, so nothing to restore.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError("the model makes grey images: there are no colours to restore")
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)

    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        return measurement.expand(-1, self.channels, -1, -1)


class Blur(LinearOperator):
    """Deblurring: a Gaussian blur of standard deviation ``sigma`` pixels along each side, with the image mirrored at its edges.

    Frequencies that the blur reduces below ``smallest`` count as unmeasured: restoring them would amplify rounding.

    Args:
        size: the images' height and width.
        sigma: in pixels.
        smallest: smaller singular values of the blur along a side count as 0.

    Raises:
        ValueError: sigma is not positive.
    """

    blur_rows: Tensor
    blur_columns: Tensor
    inverse_rows: Tensor
    inverse_columns: Tensor

    def __init__(self, size: tuple[int, int], sigma: float, smallest: float = 0.03) -> None:
        super().__init__()
        sigma = plain(sigma)
        if not is_finite(sigma) or sigma <= 0:
            raise ValueError(f"the blur's sigma must be a positive number of pixels; got {sigma!r}")
        gain = 1.0
        for side, length in zip(("rows", "columns"), size, strict=True):
            u, s, vt = np.linalg.svd(_gaussian(length, sigma))
            kept = s > smallest
            blur, inverse = (u * np.where(kept, s, 0)) @ vt, (vt.T * np.divide(1, s, out=np.zeros_like(s), where=kept)) @ u.T
            gain *= math.sqrt(np.square(inverse).sum() / length)
            self.register_buffer(f"blur_{side}", torch.from_numpy(blur).float())
            self.register_buffer(f"inverse_{side}", torch.from_numpy(inverse).float())
        self.gain = gain

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (len(self.blur_rows), len(self.blur_columns)):
            raise ValueError(f"a blur of {len(self.blur_rows)}x{len(self.blur_columns)} does not fit images of {_size(images)}")
        return self.blur_rows @ images @ self.blur_columns.T

    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        return self.inverse_rows @ measurement @ self.inverse_columns.T


class CompressedSensing(LinearOperator):
    """A share of the Walsh-Hadamard coefficients of each channel, after random sign flips of its pixels: an orthonormal
    transform that spreads every pixel over all coefficients.

    Args:
        size: the images' height and width; their product must be a power of 2.
        ratio: the measured share of the coefficients.
        seed: seed of the signs and of the choice.

    Raises:
        ValueError: the size or the ratio is out of range.
    """

    signs: Tensor
    chosen: Tensor

    def __init__(self, size: tuple[int, int], ratio: float, seed: int = 0) -> None:
        super().__init__()
        pixels = math.prod(size)
        if pixels & (pixels - 1):
            raise ValueError(f"compressed sensing needs a number of pixels that is a power of 2; got {size[0]}x{size[1]}")
        ratio = plain(ratio)
        if not is_finite(ratio) or not 0 < ratio <= 1:
            raise ValueError(f"the ratio of compressed sensing must lie in (0, 1]; got {ratio!r}")
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.register_buffer("signs", torch.randint(0, 2, (pixels,), generator=generator).float() * 2 - 1)
        self.register_buffer("chosen", torch.randperm(pixels, generator=generator)[: max(1, round(ratio * pixels))])
        self.gain = math.sqrt(len(self.chosen) / pixels)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != tuple(self.size):
            raise ValueError(f"the measurement is of images of {self.size[0]}x{self.size[1]}, not {_size(images)}")
        return _hadamard(images.flatten(2) * self.signs).index_select(2, self.chosen)

    def pseudo_inverse(self, measurement: Tensor) -> Tensor:
        spread = measurement.new_zeros(*measurement.shape[:2], len(self.signs)).index_copy(2, self.chosen, measurement)
        return (_hadamard(spread) * self.signs).unflatten(2, self.size)


def _gaussian(length: int, sigma: float) -> np.ndarray:
    """(length, length): the blur of a row of pixels, mirrored as often as needed, with each end pixel repeated."""
    reach = math.ceil(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    matrix = np.zeros((length, length))
    for row in range(length):
        mirrored = np.arange(row - reach, row + reach + 1) % (2 * length)
        np.add.at(matrix[row], np.minimum(mirrored, 2 * length - 1 - mirrored), weights / weights.sum())
    return matrix


def _hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform along the last dimension, its own inverse."""
    length = x.shape[-1]
    half = 1
    while half < length:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(length)


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[-2:]))
