import pytest
import torch
from torch import nn

from ddim_fast.data.images import ImageSet
from ddim_fast.data.latents import encoded, latent_space
from ddim_fast.diffusion.latent import LatentCodec
from ddim_fast.models.autoencoder import Autoencoder
from ddim_fast.models.config import AutoencoderConfig
from ddim_fast.training.loop import Trainer, TrainingOptions
from ddim_fast.training.loss import AutoencoderLoss

TINY = AutoencoderConfig(
    sample_size=8, in_channels=1, latent_channels=2, base_channels=8, channel_multipliers=(1, 2), norm_num_groups=4
)


@pytest.fixture
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(TINY)


@pytest.fixture
def data() -> ImageSet:
    """Squares that are bright on one side."""
    images = torch.zeros(12, 1, 8, 8, dtype=torch.uint8)
    for i in range(12):
        images[i, :, :, : i % 4 + 1] = 20 * i
    return ImageSet(images, torch.arange(12))


def test_the_shapes_of_images_and_latents(autoencoder):
    codec = LatentCodec(autoencoder)
    assert latent_space(codec, None) == ((1, 8, 8), (2, 4, 4))
    assert latent_space(codec, 16) == ((1, 32, 32), (2, 16, 16))


def test_an_autoencoder_for_any_size_needs_one():
    diffusers = pytest.importorskip("diffusers")
    codec = LatentCodec(diffusers.AutoencoderTiny())
    assert latent_space(codec, 4) == ((3, 32, 32), (4, 4, 4))
    with pytest.raises(ValueError, match="give --set sample_size=N for images of 8"):
        latent_space(codec, None)


def test_mirrored_images_are_encoded_by_themselves(autoencoder, data):
    codec = LatentCodec(autoencoder)
    plain, both = encoded(data, codec, mirrored=False), encoded(data, codec, mirrored=True)
    assert plain.images.dtype == torch.float32 and plain.images.shape == (12, 2, 4, 4)
    assert torch.equal(both.images[:12], plain.images) and both.labels.tolist() == [*range(12)] * 2
    mirrored = encoded(ImageSet(data.images.flip(3), None), codec, mirrored=False)
    assert torch.equal(both.images[12:], mirrored.images) and mirrored.labels is None
    assert not torch.allclose(mirrored.images, plain.images.flip(3), atol=1e-2)


def test_the_loss_is_error_and_divergence(autoencoder):
    class Fixed(nn.Module):
        """A posterior of mean m and variance s^2, and a decoder that returns the latents."""

        def posterior(self, images):
            return torch.full_like(images, 3.0), torch.full_like(images, 2 * torch.tensor(0.5).log())

        def decoder(self, latents):
            return latents

    images = torch.full((64, 1, 32, 32), 3.0)
    torch.manual_seed(0)
    # |0.5 n| for n normal is 0.5 sqrt(2 / pi) in the mean; the divergence is (m^2 + s^2 - 1 - ln s^2) / 2.
    error = 0.5 * (2 / torch.pi) ** 0.5
    divergence = 0.5 * (9 + 0.25 - 1 - torch.tensor(0.25).log())
    torch.testing.assert_close(AutoencoderLoss(0.0)(Fixed(), images, None), torch.tensor(error), atol=5e-3, rtol=0)
    torch.testing.assert_close(AutoencoderLoss(0.1)(Fixed(), images, None), error + 0.1 * divergence, atol=5e-3, rtol=0)


def test_an_autoencoder_learns_its_images(autoencoder, data, tmp_path):
    options = TrainingOptions(steps=150, batch_size=12, lr=3e-3, warmup=10, ema=0.9, flip=False)
    trainer = Trainer(autoencoder, data, options)
    losses = [step.loss.item() for step in trainer.run()]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    trainer.save(tmp_path)
    codec = LatentCodec(Autoencoder.from_pretrained(tmp_path))
    images = data.images / 127.5 - 1
    latents = codec.encode(images)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(2), atol=1e-4, rtol=0)
    assert (codec.decode(latents) - images).abs().mean() < 0.15


def test_a_run_goes_on_as_if_it_had_not_stopped(data, tmp_path):
    def trainer() -> Trainer:
        torch.manual_seed(0)
        return Trainer(Autoencoder(TINY), data, TrainingOptions(steps=6, batch_size=4, warmup=0))

    whole, first, second = trainer(), trainer(), trainer()
    list(whole.run())
    for step in first.run():
        if step.step == 3:
            break
    first.save(tmp_path)
    second.load(tmp_path)
    list(second.run())
    for name, weights in whole.averaged_model().state_dict().items():
        if not name.startswith("latent_"):  # the scale is found when it is saved
            assert torch.equal(weights, second.averaged_model().state_dict()[name]), name
