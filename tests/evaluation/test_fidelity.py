import sys

import numpy as np
import pytest

from ddim_fast.evaluation.fidelity import check_similarity, peak_signal_to_noise, structural_similarity

METRICS = pytest.importorskip("skimage.metrics")


def pictures(channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, 12, 17, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_is_that_of_scikit_image(channels):
    a, b = pictures(channels), pictures(channels, 1)
    expected = [METRICS.peak_signal_noise_ratio(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(peak_signal_to_noise(b, a), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_falls_with_noise(channels):
    a = np.full((2, 32, 32, channels), 128, np.uint8)
    a[:, 8:24, 8:24] = 240
    noise = np.random.default_rng(0).normal(0, 1, a.shape)
    values = np.stack([structural_similarity((a + noise * std).clip(0, 255).astype(np.uint8), a) for std in (5, 20, 60)])
    assert values.shape == (3, 2) and (np.diff(values, axis=0) < -0.1).all() and (values > -0.1).all()


def test_equal_pictures_are_as_good_as_can_be():
    a = pictures(3)
    assert peak_signal_to_noise(a, a).tolist() == [100.0] * 3
    np.testing.assert_allclose(structural_similarity(a, a), 1)


def test_a_constant_shift_is_as_computed_by_hand():
    """Of constant pictures SSIM is its luminance term, (2ab + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2."""
    a, b, c = 100, 120, 2.55**2
    flat = np.full((1, 16, 16, 1), a, np.uint8)
    assert structural_similarity(flat, flat + np.uint8(b - a))[0] == pytest.approx((2 * a * b + c) / (a**2 + b**2 + c))
    assert peak_signal_to_noise(flat, flat + np.uint8(b - a))[0] == pytest.approx(20 * np.log10(255 / 20))


@pytest.mark.parametrize("measure", [peak_signal_to_noise, structural_similarity])
@pytest.mark.parametrize("shape", [(3, 12, 17, 1), (1, 12, 17, 3), (3, 17, 12, 3)])
def test_pictures_of_other_shapes_are_not_compared(measure, shape):
    """NumPy would repeat a grey picture for each colour, and one picture for all."""
    with pytest.raises(ValueError, match=r"shape \(3, 12, 17, 3\) cannot be compared pixel by pixel with those of \("):
        measure(pictures(3), np.zeros(shape, np.uint8))


def test_what_cannot_be_measured_is_named(monkeypatch):
    with pytest.raises(ValueError, match="window of 11x11 pixels; these pictures are 8x20"):
        check_similarity((8, 20))
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddim_fast\[restore\]'"):
        check_similarity((16, 16))
