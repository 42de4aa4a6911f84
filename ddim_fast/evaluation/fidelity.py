"""How close pictures are to the true ones, picture by picture."""

from __future__ import annotations

import numpy as np

__all__ = ["peak_signal_to_noise", "require_similarity", "structural_similarity"]

# What counts for no difference at all, so that means stay finite.
_IDENTICAL = 100.0


def peak_signal_to_noise(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR, 10 log10(255^2 / MSE).

    Args:
        pictures, truth: (N, H, W, C) uint8.

    Returns:
        (N,) float64 in dB; at most 100, which stands for equality.
    """
    errors = np.square(pictures.astype(np.float64) - truth).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(errors, 255**2 / 10 ** (_IDENTICAL / 10)))


def structural_similarity(pictures: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SSIM with the Gaussian window and the constants of Wang et al. 2004, by scikit-image; the mean over colours.

    Args:
        pictures, truth: (N, H, W, C) uint8, at least 11 pixels on each side.

    Returns:
        (N,) float64, 1 for equality.

    Raises:
        ValueError: scikit-image is missing, or the pictures are smaller.
    """
    require_similarity()
    from skimage.metrics import structural_similarity as similarity

    if min(pictures.shape[1:3]) < 11:
        raise ValueError(
            f"SSIM looks through a window of 11x11 pixels; these pictures are {pictures.shape[1]}x{pictures.shape[2]}"
        )
    options = {"channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return np.array([similarity(a, b, **options) for a, b in zip(pictures, truth, strict=True)])


def require_similarity() -> None:
    """Raises what :func:`structural_similarity` raises where scikit-image is missing."""
    try:
        import skimage.metrics  # noqa: F401
    except ImportError:
        raise ValueError("SSIM needs scikit-image: pip install 'ddim_fast[restore]'") from None
