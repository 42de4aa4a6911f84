import json

import pytest
import torch

from ddim_fast.models.autoencoder import Autoencoder
from ddim_fast.models.config import AutoencoderConfig

TINY = AutoencoderConfig(sample_size=16, base_channels=8, channel_multipliers=(1, 2), norm_num_groups=4)


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TINY).eval()


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_latents_are_smaller_by_the_factor(autoencoder):
    latents = autoencoder.encode(images(2))
    assert TINY.factor == 2 and latents.shape == (2, 4, 8, 8)
    assert autoencoder.decode(latents).shape == (2, 3, 16, 16)


@torch.no_grad()
def test_fitted_latents_have_mean_0_and_variance_1(autoencoder):
    before = autoencoder.decode(autoencoder.posterior(images(20))[0])
    autoencoder.fit_scale(images(20), batch_size=7)
    latents = autoencoder.encode(images(20))
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)
    # The scale is undone: the images are those of before.
    torch.testing.assert_close(autoencoder.decode(latents), before, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_it_is_the_same(autoencoder, tmp_path):
    autoencoder.fit_scale(images(4))
    autoencoder.save_pretrained(tmp_path)
    again = Autoencoder.from_pretrained(tmp_path)
    assert again.config == TINY and not again.training
    with torch.no_grad():
        assert torch.equal(again.encode(images(2)), autoencoder.encode(images(2)))


def test_images_of_another_size_are_refused(autoencoder):
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 3, 16, 16\); got \(1, 3, 8, 8\)"):
        autoencoder.encode(torch.zeros(1, 3, 8, 8))


def test_a_weight_that_is_not_finite_is_named(autoencoder, tmp_path):
    with torch.no_grad():
        autoencoder.latent_std[1] = torch.nan
    autoencoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'latent_std' is not finite"):
        Autoencoder.from_pretrained(tmp_path)


def test_a_checkpoint_of_something_else_is_refused(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_classes": 10}))
    with pytest.raises(ValueError, match=r"config.json: unknown configuration key 'num_classes'"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 3}))
    with pytest.raises(ValueError, match=r"model.safetensors: tensor '\S+' has shape"):
        Autoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": 15}, "sample_size must be a multiple of 2"),
        ({"latent_channels": 0}, "latent_channels must be at least 1; got 0"),
        ({"channel_multipliers": ()}, "channel_multipliers must be one positive integer per level"),
        ({"norm_num_groups": 3}, "norm_num_groups must be a divisor"),
        ({"base_channels": 2**20}, "base_channels must be such that no level has more than 65536 channels"),
        ({"layers_per_block": 10**6}, "layers_per_block must be at most 512 in all levels together"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"base_channels": "8"}, "base_channels must be an integer; got '8'"),
    ],
)
def test_impossible_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{**TINY.to_dict(), **fields})
