"""The U-Net on signals: images of height 1."""

import pytest
import torch

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.data.images import ImageSet
from ddim_fast.training.loop import Trainer, TrainingOptions

SMALL = {
    "sample_size": (1, 32),
    "in_channels": 4,
    "base_channels": 16,
    "channel_multipliers": (1, 2, 2),
    "layers_per_block": 1,
    "attention_resolutions": (16,),
    "norm_num_groups": 4,
    "num_classes": 2,
    "dropout": 0.0,
    "prediction_type": "v_prediction",
}


@pytest.fixture
def signals() -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(**SMALL))
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.mark.parametrize("padding", [0, 1])
def test_levels_halve_the_width_alone(padding):
    model = UNet(UNetConfig(**{**SMALL, "downsample_padding": padding}))
    seen = []
    for block in (*model.down_blocks, *model.up_blocks):
        block.resnets[-1].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    assert model(torch.zeros(2, 4, 1, 32), torch.tensor(5)).shape == (2, 4, 1, 32)
    assert seen == [(1, 32), (1, 16), (1, 8), (1, 8), (1, 16), (1, 32)]
    kernels = {m.kernel_size for m in model.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kernels == {(1, 3), (1, 1)}


def test_attention_is_where_the_width_says(signals):
    assert [block.attentions is not None for block in signals.down_blocks] == [False, True, False]


def test_an_output_depends_on_both_sides(signals):
    """Convolutions and the steps between levels reach left and right, and everything reaches the middle block's attention."""
    x = torch.zeros(2, 4, 1, 32, requires_grad=True)
    signals(x, torch.tensor(5), torch.tensor([0, 1]))[0, :, 0, 16].sum().backward()
    assert (x.grad[0].abs().sum((0, 1)) > 0).all() and not x.grad[1].any()


def test_for_inference_it_computes_the_same(signals):
    x, t, labels = torch.randn(3, 4, 1, 32), torch.tensor(300), torch.tensor([0, 1, 2])
    expected = signals(x, t, labels)
    with torch.no_grad():
        torch.testing.assert_close(signals.for_inference(torch.float32)(x, t, labels), expected, atol=1e-5, rtol=1e-5)
        low = signals.for_inference(torch.bfloat16)(x.bfloat16(), t, labels).float()
    assert (low - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("reuse", [1, 2])
def test_it_samples_by_seed(signals, reuse):
    sampler = Sampler(signals, steps=6, reuse=reuse)
    both = sampler.sample(seeds=[3, 4], labels=[0, 1], guidance=2.0)
    assert both.shape == (2, 4, 1, 32) and both.isfinite().all()
    torch.testing.assert_close(sampler.sample(seeds=[4], labels=[1], guidance=2.0), both[1:], rtol=0, atol=0)


def test_signals_come_back_from_their_noise(signals):
    sampler = Sampler(signals, steps=10)
    x = torch.rand(2, 4, 1, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    again = sampler.sample(x_T=sampler.encode(x, labels=[0, 1], exact=True), labels=[0, 1])
    assert (again - x).abs().max() < 1e-3


def test_eight_bits_are_refused(signals):
    with pytest.raises(ValueError, match=r"no 8-bit products here|torch\.int8"):
        Sampler(signals, steps=4, dtype=torch.int8)


@pytest.mark.slow
def test_it_learns():
    wave = torch.sin(torch.arange(128) / 3).view(32, 4).t()[None, :, None]
    data = ImageSet(torch.cat([wave, -wave]), torch.tensor([0, 1]))
    options = TrainingOptions(steps=150, batch_size=8, warmup=0, lr=3e-3, ema=0.9, flip=False)
    torch.manual_seed(0)
    losses = [float(step.loss) for step in Trainer(UNet(UNetConfig(**SMALL)), data, options).run()]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.mark.parametrize(
    ("size", "message"), [((1, 30), "a multiple of 4"), ((2, 32), "a multiple of 4"), ((0, 32), "at least 1")]
)
def test_impossible_sizes(size, message):
    with pytest.raises(ValueError, match=f"sample_size must be .*{message}"):
        UNetConfig(**{**SMALL, "sample_size": size})


def test_sizes_are_stored_as_they_are_meant():
    config = UNetConfig(**SMALL)
    assert config.to_dict()["sample_size"] == [1, 32] and UNetConfig.from_dict(config.to_dict()) == config
    assert UNetConfig(sample_size=[16, 16]).sample_size == 16
    assert UNetConfig(sample_size=(16, 24), channel_multipliers=(1, 2)).image_shape == (3, 16, 24)
