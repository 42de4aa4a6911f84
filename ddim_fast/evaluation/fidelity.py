"""The distance of pictures from their originals, picture by picture."""

from __future__ import annotations

import numpy as np

__all__ = ["check_similarity", "peak_signal_to_noise", "structural_similarity"]

# PSNR of equal pictures, so that means stay finite.
_IDENTICAL = 100.0

# Side of SSIM's window, in pixels.
_WINDOW = 11


def peak_signal_to_noise(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR, 10 log10(255^2 / MSE).

    Args:
        pictures, truth: (N, H, W, C) uint8.

    Returns:
        (N,) float64 in dB, at most 100, the value of equal pictures.

    Raises:
        ValueError: their shapes differ.
    """
    _check_shapes(pictures, truth)
    errors = np.square(pictures.astype(np.float64) - truth).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 255**2 / 10 ** (_IDENTICAL / 10)))


def structural_similarity(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SSIM with the Gaussian window and the constants of Wang et al. 2004, by scikit-image; the mean over colours.

    Args:
        pictures, truth: (N, H, W, C) uint8.

    Returns:
        (N,) float64, 1 for equality.

    Raises:
        ValueError: their shapes differ; or as :func:`check_similarity`.
    """
    _check_shapes(pictures, truth)
    check_similarity(pictures.shape[1:3])
    from skimage.metrics import structural_similarity as similarity

    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return np.array([similarity(a, b, **options) for a, b in zip(pictures, truth, strict=True)])


def check_similarity(size: tuple[int, int]) -> None:
    """Check that :func:`structural_similarity` can compare pictures of ``size``, height and width.

    Raises:
        ValueError: the pictures are smaller than its window.
        ModuleNotFoundError: scikit-image is missing.
    """
    if min(size) < _WINDOW:
        raise ValueError(f"SSIM needs a window of {_WINDOW}x{_WINDOW} pixels; these pictures are {size[0]}x{size[1]}")
    try:
        import skimage.metrics  # noqa: F401
    except ImportError:
        raise ModuleNotFoundError("SSIM needs scikit-image: pip install 'ddim_fast[restore]'") from None


def _check_shapes(pictures: np.ndarray, truth: np.ndarray) -> None:
    if pictures.shape != truth.shape:  # NumPy would compare a grey picture with each colour
        raise ValueError(f"pictures of shape {pictures.shape} cannot be compared pixel by pixel with those of {truth.shape}")
