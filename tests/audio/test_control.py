import pytest
import torch
from torch import nn

from ddim_fast import NoiseSchedule, Sampler, UNet, UNetConfig
from ddim_fast.audio.codec import make_codec
from ddim_fast.audio.control import loudness_guidance, restyle
from tests.helpers.tones import MEL, tone


@pytest.fixture
def sampler(config):
    """Of a U-Net of random weights."""
    torch.manual_seed(0)
    _, height, width = config.image_shape
    network = UNetConfig(
        sample_size=(height, width),
        in_channels=config.image_shape[0],
        base_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        attention_resolutions=(),
        norm_num_groups=4,
        num_classes=3,
        prediction_type="v_prediction",
    )
    model = UNet(network)
    model.audio = config
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return Sampler(model, steps=12)


class Around(nn.Module):
    """The ideal network of images that are normally distributed around one, with a standard deviation of 0.2."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        channels, *size = image.shape
        fields = {"sample_size": tuple(size), "in_channels": channels, "channel_multipliers": (1,)}
        self.config = UNetConfig(**fields, prediction_type="sample")
        self.mean = nn.Parameter(image)
        self.levels = torch.tensor(NoiseSchedule.from_config(self.config).alphas_cumprod).float()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: None = None) -> torch.Tensor:
        level = self.levels[timesteps].view(-1, 1, 1, 1)
        gain = level.sqrt() * 0.2**2 / (level * 0.2**2 + 1 - level)
        return self.mean + gain * (x - level.sqrt() * self.mean)


def test_guidance_brings_the_loudness_to_a_curve(config):
    codec = make_codec(config)
    sampler = Sampler(Around(codec.encode(tone(500)[None])[0]), steps=40)
    free = sampler.sample(seeds=[0, 1])
    curve = codec.loudness(free) + torch.tensor([[-6.0], [4.0]])
    errors = []
    for std in (30.0, 10.0, 1.5):
        held = sampler.sample(seeds=[0, 1], gradient=loudness_guidance(sampler, codec, curve, std=std))
        errors.append(float((codec.loudness(held) - curve)[:, 4:12].abs().mean()))
    assert errors[2] < errors[1] < errors[0] < 5.1 and errors[2] < 2.5  # 5 without


def test_restyling_without_a_curve_is_encoding_and_decoding(sampler, config):
    codec = make_codec(config)
    images = 0.2 * torch.randn(2, *config.image_shape, generator=torch.Generator().manual_seed(1))
    restyled = restyle(sampler, codec, images, source=torch.tensor([0, 1]), target=2)
    latents = sampler.encode(images, labels=[0, 1])
    torch.testing.assert_close(restyled, sampler.sample(x_T=latents, labels=2), rtol=0, atol=0)
    again = restyle(sampler, codec, images, source=0, target=0, exact=True)
    assert (again - images).abs().max() < 1e-3


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_standard_deviation_is_positive(std):
    with pytest.raises(ValueError, match="standard deviation of the loudness must be positive"):
        loudness_guidance(None, make_codec(MEL), torch.zeros(1, MEL.frames), std)


def test_a_curve_has_the_models_frames():
    with pytest.raises(ValueError, match=r"shape \(N, 16\); got \(1, 17\)"):
        loudness_guidance(None, make_codec(MEL), torch.zeros(1, 17), 1.0)
