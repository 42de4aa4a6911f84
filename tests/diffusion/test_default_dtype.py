"""What torch.set_default_dtype says is for the user's own tensors: everything here stays float32, with the same bits."""

import pytest
import torch

from ddim_fast import Autoencoder, AutoencoderConfig, LatentSampler, Sampler, UNet, fast_ddim_step, seeded_noise
from ddim_fast.audio.codec import make_codec
from ddim_fast.diffusion.degradations import Blur, CompressedSensing, Downscale, Grey, Mask
from ddim_fast.diffusion.editing import sdedit
from ddim_fast.diffusion.guidance import likelihood_gradient
from ddim_fast.diffusion.interpolation import between_all, slerp_grid
from ddim_fast.models.audio import AudioConfig


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 16)


@pytest.fixture
def autoencoder(tmp_path):
    fields = {"channel_multipliers": (1, 2), "base_channels": 16, "norm_num_groups": 8, "latent_channels": 3}
    Autoencoder(AutoencoderConfig(sample_size=32, **fields)).save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def in_float64(compute):
    """What ``compute`` returns while new tensors are float64 by default."""
    torch.set_default_dtype(torch.float64)
    try:
        return compute()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_unmoved(compute):
    for found, expected in zip(in_float64(lambda: [*compute()]), compute(), strict=True):
        assert found.dtype == expected.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [{"eta": 1.0}, {"solver": "unipc", "reuse": 2}, {"tolerance": 0.1}, {"dtype": torch.bfloat16}, {"dtype": torch.int8}],
)
def test_of_sampling(options, small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path)

    def results():
        sampler = Sampler(UNet.from_pretrained(tmp_path), steps=2, **options)
        yield sampler.sample(seeds=[0, 1], labels=1, guidance=2.0)
        yield sampler.sample(seeds=[])

    assert_unmoved(results)


def test_of_all_else_that_a_sampler_does(images, small_unet):
    sampler = Sampler(small_unet, steps=2)

    def results():
        yield sampler.noise([0])
        yield sampler.noised(images, [0, 1])
        yield sampler.encode(images)
        yield from (tensor for state in sampler.trajectory(seeds=[0]) for tensor in (state.x, state.x0))
        gradient = likelihood_gradient(lambda x0: -x0.square().sum((1, 2, 3)), sampler)
        yield sampler.sample(seeds=[0], gradient=gradient)
        yield sdedit(sampler, images, 0.5, seeds=[0, 1])
        yield from (between_all(images, 3), slerp_grid(images[[0, 1, 0, 1]], 2, 3))
        yield seeded_noise([0], 0, (3, 4, 4))
        yield fast_ddim_step(images, images, [0.5, 0.4], [0.6, 0.7], eta=1.0, seeds=[0, 1])
        size = (16, 16)
        for operator in (Grey(3), Downscale(2), Blur(size, 1.0), CompressedSensing(size, 0.5), Mask(images[0, 0] > 0.5)):
            yield sampler.restore(operator(images), operator, seeds=[0, 1], noise_std=0.1)

    assert_unmoved(results)


def test_of_latents(autoencoder, images, small_unet):
    larger = images.repeat(1, 1, 2, 2)

    def results():
        sampler = LatentSampler(Sampler(small_unet, steps=2), Autoencoder.from_pretrained(autoencoder))
        yield sampler.sample(seeds=[0])
        yield sampler.latents(larger)
        yield from (sampler.latents(larger[:0]), sampler.decode(images[:0]))

    assert_unmoved(results)


@pytest.mark.parametrize("preset", ["digits-mel", "digits-waveform"])
def test_of_sounds(preset):
    codec = make_codec(AudioConfig.preset(preset))
    waves = torch.sin(torch.arange(codec.config.length) / 20)[None].numpy()

    def results():
        spectrograms = codec.encode(waves)
        yield from (spectrograms, codec.loudness(spectrograms), codec.spectrograms(spectrograms))

    assert_unmoved(results)
