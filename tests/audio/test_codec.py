import dataclasses

import numpy as np
import pytest
import torch

from ddim_fast.audio.codec import make_codec
from ddim_fast.audio.spectrogram import griffin_lim, log_mel
from tests.helpers.tones import MEL, WAVEFORM, tone


def test_images_have_the_networks_shape_and_range(config):
    images = make_codec(config).encode(np.stack([tone(440), np.zeros(2048, np.float32)]))
    assert images.shape == (2, *config.image_shape) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images[0].std() > 0.01
    assert (images[1] == make_codec(config).silence).all()


def test_a_waveform_comes_back_bit_for_bit():
    waves = np.random.default_rng(0).uniform(-1, 1, (3, 2048)).astype(np.float32)
    codec = make_codec(WAVEFORM)
    images = codec.encode(waves)
    assert images[1, 5, 0, 7] == waves[1, 8 * 7 + 5]
    np.testing.assert_array_equal(codec.decode(images), waves)
    assert abs(codec.decode(3 * images)).max() == 1


def test_a_sound_from_a_spectrogram_has_that_spectrogram():
    spectrogram = log_mel(np.stack([tone(440), tone(900)]), MEL)
    waves = griffin_lim(spectrogram, MEL)
    assert waves.shape == (2, 2048) and np.isfinite(waves).all()
    loud = spectrogram > spectrogram.max() - 25
    assert np.abs(log_mel(waves, MEL) - spectrogram)[loud].mean() < 1.5  # decibels
    np.testing.assert_array_equal(waves[1:], griffin_lim(spectrogram[1:], MEL))  # whatever else is in the batch


@pytest.mark.parametrize("hertz", [250, 1000, 1800])
def test_a_tone_is_in_its_band(hertz):
    import librosa

    band = log_mel(tone(hertz)[None], MEL)[0].mean(1).argmax()
    low, middle, high = librosa.mel_frequencies(MEL.mels + 2, fmax=2000)[band : band + 3]
    assert low < hertz < high and abs(hertz - middle) < (high - low) / 2


def test_loudness_is_the_mean_square_of_a_frame(config):
    # Away from the spectrum's ends, which the outermost bands do not cover.
    wave = np.full((1, 2048), 0.25, np.float32) * np.sin(2 * np.pi * 700 / 4000 * np.arange(2048))
    loudness = make_codec(config).loudness(make_codec(config).encode(wave.astype(np.float32)))
    assert loudness.shape == (1, config.frames)
    expected = 10 * np.log10(0.25**2 / 2)
    assert (loudness[0, 2:-2] - expected).abs().max() < 0.5


def test_loudness_rises_by_the_gain_and_has_a_gradient(config):
    codec = make_codec(dataclasses.replace(config, floor_db=-120.0, ceiling_db=0.0))
    images = codec.encode(np.stack([tone(500), 0.5 * tone(500)]))
    loud, soft = codec.loudness(images)[:, 6:10]
    torch.testing.assert_close(loud - soft, torch.full((4,), 20 * np.log10(2)).float(), atol=0.02, rtol=0)
    images = images.clone().requires_grad_()
    codec.loudness(images).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0


def test_pictures_have_low_notes_at_the_bottom(config):
    codec = make_codec(config)
    low, high = codec.spectrograms(codec.encode(np.stack([tone(200), tone(1700)])))[:, 0]
    assert low.shape == (config.mels, config.frames)
    assert low.mean(1).argmax() > 12 and high.mean(1).argmax() < 4
