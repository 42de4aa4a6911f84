import pytest
import torch
from torch import nn

from ddim_fast import Autoencoder, AutoencoderConfig, LatentSampler, Sampler, UNet, UNetConfig
from ddim_fast.diffusion.degradations import Mask
from ddim_fast.diffusion.editing import sdedit
from ddim_fast.diffusion.latent import LatentCodec
from ddim_fast.diffusion.restoration import TimeTravel


class Folded(nn.Module):
    """Squares of 2x2 pixels as channels, halved: an autoencoder that loses nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def encode(self, images):
        return nn.functional.pixel_unshuffle(images, 2) * self.factor

    def decode(self, latents):
        return nn.functional.pixel_shuffle(latents / self.factor, 2)


def ours() -> Autoencoder:
    return Autoencoder(
        AutoencoderConfig(sample_size=16, in_channels=1, base_channels=8, channel_multipliers=(1, 2), norm_num_groups=4)
    )


def kl(**options):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4, "sample_size": 16}
    return diffusers.AutoencoderKL(**blocks, **shape, **options)


def tiny():
    diffusers = pytest.importorskip("diffusers")
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return diffusers.AutoencoderTiny(in_channels=1, out_channels=1, **channels, **blocks)


AUTOENCODERS = {"folded": Folded, "ours": ours, "AutoencoderKL": kl, "AutoencoderTiny": tiny}


@pytest.fixture(scope="module")
def network() -> UNet:
    """A class-conditional network of (4, 8, 8) latents, none of whose weights is zero."""
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            sample_size=8,
            in_channels=4,
            base_channels=8,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            attention_resolutions=(4,),
            norm_num_groups=4,
            num_classes=3,
        )
    )
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network


@pytest.fixture(params=AUTOENCODERS)
def sampler(request, network) -> LatentSampler:
    torch.manual_seed(1)
    return LatentSampler(Sampler(network, steps=3), AUTOENCODERS[request.param]())


REQUEST = {"seeds": [5, 6, 7], "labels": [0, 1, 2], "guidance": 1.5}


def test_images_are_the_decoded_latents(sampler):
    images = sampler.sample(**REQUEST)
    assert sampler.image_shape == (1, 16, 16) and images.shape == (3, 1, 16, 16) and images.isfinite().all()
    assert torch.equal(images, sampler.decode(sampler.sampler.sample(**REQUEST)))


def test_an_image_does_not_depend_on_its_batch(sampler):
    # To the last bit; the attention of diffusers' autoencoder sums in an order that depends on the batch.
    rounding = 0.0 if sampler.codec.autoencoder.__class__.__name__ != "AutoencoderKL" else 1e-6
    images = sampler.sample(**REQUEST)
    for size in (1, 2):
        torch.testing.assert_close(sampler.sample(**REQUEST, batch_size=size), images, atol=rounding, rtol=rounding)
    torch.testing.assert_close(sampler.encode(images[1:2]), sampler.encode(images)[1:2], atol=rounding, rtol=100 * rounding)


def test_the_states_are_decoded(sampler):
    seen = []
    images = sampler.sample(**REQUEST, on_step=lambda state: seen.append((state.step, state.timestep, state.x, state.x0)))
    states = list(sampler.trajectory(**REQUEST))
    assert [s.step for s in states] == [0, 1, 2] and [s.timestep for s in states] == sampler.timesteps.tolist()
    for state, (step, timestep, x, x0) in zip(states, seen, strict=True):
        assert (state.step, state.timestep) == (step, timestep)
        assert torch.equal(state.x, x) and torch.equal(state.x0, x0)
        assert torch.equal(x, sampler.decode(state.latent.x)) and torch.equal(x0, sampler.decode(state.latent.x0))
    assert torch.equal(states[-1].x, images)


def test_no_images(sampler):
    assert sampler.sample(seeds=[]).shape == (0, 1, 16, 16)
    assert sampler.encode(torch.zeros(0, 1, 16, 16)).shape == (0, 4, 8, 8)


def test_exact_inversion_gives_the_images_back(network):
    sampler = LatentSampler(Sampler(network, steps=6), Folded())
    images = sampler.sample(seeds=[1, 2], labels=[0, 2])
    x_T = sampler.encode(images, labels=[0, 2], exact=True)
    torch.testing.assert_close(sampler.sample(x_T=x_T, labels=[0, 2]), images, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(x_T, sampler.noise([1, 2]), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"scaling_factor": 0.3},
        {"scaling_factor": 0.5, "shift_factor": 0.1},
        {"latents_mean": [1, 2, 3, 4], "latents_std": [2] * 4},
    ],
)
def test_diffusers_scaling(options):
    torch.manual_seed(2)
    autoencoder = kl(**options).eval()
    images = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        mean = autoencoder.encode(images).latent_dist.mean
    shift = torch.tensor(options.get("latents_mean", [options.get("shift_factor", 0.0)] * 4))[:, None, None]
    scale = options.get("scaling_factor", 0.18215) / options.get("latents_std", [1])[0]
    codec = LatentCodec(autoencoder)
    torch.testing.assert_close(codec.encode(images), (mean - shift) * scale)
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(codec.encode(images)), autoencoder.decode(mean).sample, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_of_other_latents_is_refused(network):
    with pytest.raises(ValueError, match=r"does not decode the network's latents, of shape \(4, 8, 8\)"):
        LatentSampler(Sampler(network, steps=2), kl(latent_channels=3))


def test_pixels_are_refused(sampler):
    pixels = torch.zeros(1, *sampler.image_shape, dtype=torch.uint8)
    for call in (sampler.encode, lambda x: sampler.noised(x, [0]), lambda x: sampler.sample(x_T=x)):
        with pytest.raises(ValueError, match=r"got torch\.uint8: convert"):
            call(pixels)


def test_it_shows_itself_on_one_line(network):
    shown = repr(LatentSampler(Sampler(network, steps=3), Folded()))
    assert shown == (
        "LatentSampler(Sampler(Denoiser(UNet 4x8x8, float32, cpu), ddim, 3 steps quadratic, eta 0.0, eager), Folded 1x16x16)"
    )


def test_images_of_another_size_are_refused(sampler):
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 1, 16, 16\); got \(2, 1, 8, 8\)"):
        sampler.encode(torch.zeros(2, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_restoration_keeps_to_what_was_measured(engine, network):
    """Of images that the network makes itself, by an autoencoder that loses nothing."""
    sampler = LatentSampler(Sampler(network, steps=4, engine=engine), Folded())
    images = sampler.sample(seeds=[1, 2], labels=[0, 1]).clamp(-1, 1)
    mask = Mask.outside((16, 16), [(4, 4, 8, 8)])
    restored = sampler.restore(mask(images), mask, seeds=[3, 4], labels=[0, 1], travel=TimeTravel(2, 2))
    assert torch.equal(mask(restored), mask(images)) and restored.isfinite().all()
    assert not torch.equal(restored, images)
    again = sampler.restore(mask(images)[1:], mask, seeds=[4], labels=[1], travel=TimeTravel(2, 2))
    torch.testing.assert_close(again, restored[1:], atol=1e-5, rtol=1e-5)


def test_restoration_by_an_exact_autoencoder_is_that_of_the_images(network):
    """Folding commutes with a projection of pixels, so that in both spaces the same numbers are corrected."""

    class Unfolded(Mask):
        """The same pixels, of folded images."""

        def forward(self, images):
            return Folded().encode(super().forward(Folded().decode(images)))

    sampler = Sampler(network, steps=4)
    known = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    latents = sampler.sample(seeds=[1, 2], labels=[0, 1])
    images = Folded().decode(latents).detach()
    in_latents = sampler.restore(Unfolded(known)(latents).detach(), Unfolded(known), seeds=[3, 4], labels=[0, 1])
    in_images = LatentSampler(sampler, Folded()).restore(Mask(known)(images), Mask(known), seeds=[3, 4], labels=[0, 1])
    torch.testing.assert_close(in_images, Folded().decode(in_latents).detach(), atol=1e-4, rtol=1e-4)


def test_measurements_of_another_size_are_refused(sampler):
    mask = Mask(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"of images of shape \(1, 8, 8\), but the autoencoder's are \(1, 16, 16\)"):
        sampler.restore(torch.zeros(1, 1, 8, 8), mask, seeds=[0])


def test_with_a_new_engine_the_images_are_the_same(sampler):
    other = sampler.with_new_engine()
    assert other.codec is sampler.codec and other.denoiser is sampler.denoiser and other.solver is not sampler.solver
    assert torch.equal(other.sample(seeds=[1, 2]), sampler.sample(seeds=[1, 2]))


def test_part_of_the_way(sampler):
    images = sampler.sample(**REQUEST).clamp(-1, 1)
    part = sampler.starting_at(400)
    noised = part.noised(images, [1, 2, 3])
    assert torch.equal(noised, part.sampler.noised(sampler.latents(images), [1, 2, 3]))
    edited = sdedit(sampler, images, 0.401, seeds=[1, 2, 3], labels=[0, 1, 2])
    assert torch.equal(edited, part.sample(x_T=noised, labels=[0, 1, 2]))
