import dataclasses

import pytest
import torch

from ddim_fast import UNet, UNetConfig
from ddim_fast.models.widening import widen


def twice(config: UNetConfig, **fields) -> UNetConfig:
    return dataclasses.replace(config, **{"base_channels": 2 * config.base_channels, **fields})


@torch.no_grad()
def assert_same_function(wide: UNet, model: UNet) -> None:
    x, t = torch.randn(4, *model.config.image_shape), torch.tensor([0, 5, 700, 999])
    classes = model.config.num_classes
    for labels in (None,) if classes is None else (None, torch.tensor([1, 0, classes, 2])):
        expected = model(x, t, labels)
        assert expected.std() > 0.1
        assert (wide(x, t, labels) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 10},
        {"flip_sin_to_cos": True, "freq_shift": 0.0, "downsample_padding": 1},
        {"sample_size": (1, 32), "channel_multipliers": (2, 1), "attention_resolutions": (16, 32), "layers_per_block": 2},
    ],
)
def test_a_wide_network_has_the_function_of_the_narrow_one(fields, make_unet):
    model = make_unet(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = widen(model, twice(model.config))
    assert wide.config.level_channels == tuple(2 * width for width in model.config.level_channels)
    assert_same_function(wide, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = widen(model, twice(model.config)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in wide.state_dict().items())


def test_heads_stay_as_many(make_unet):
    model = make_unet(attention_head_dim=8)
    wide = widen(model, twice(model.config, attention_head_dim=16))
    assert wide.mid_block.attentions[0].heads == model.mid_block.attentions[0].heads == 4
    assert_same_function(wide, model)


def test_the_packaged_model_becomes_the_papers_network():
    model = UNet.from_pretrained("cifar10-64")
    architecture = UNetConfig.preset("cifar10-128")
    wide = widen(model, architecture)
    assert wide.config.level_channels == architecture.level_channels
    assert_same_function(wide, model)


def test_the_copies_of_a_channel_get_different_gradients(make_unet):
    """Their directions differ, too: Adam would undo a factor."""
    model = make_unet(num_classes=10)
    wide = widen(model, twice(model.config))
    torch.manual_seed(1)
    x, labels = torch.randn(4, 3, 16, 16), torch.tensor([1, 2, 3, 10])
    (wide(x, torch.tensor([5, 300, 700, 900]), labels) - x).square().mean().backward()
    for name, p in wide.named_parameters():
        if p.ndim < 2 or len(p) != 2 * len(model.get_parameter(name)):
            continue  # class embeddings have their channels along the other axis, and the last convolution has no copies
        # The queries have equal gradients at first, and are not equal themselves.
        numbers = p.detach() if "to_q" in name else p.grad
        one, other = numbers.flatten(1)[::2], numbers.flatten(1)[1::2]
        assert torch.cosine_similarity(one, other).median() < 0.999, name


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"base_channels": 16}, "a network of twice the channels has base_channels 32, not 16"),
        ({"channel_multipliers": (1, 2, 2)}, r"has channel_multipliers \(1, 2\), not \(1, 2, 2\)"),
        ({"layers_per_block": 2}, "has layers_per_block 1, not 2; choose one that differs in width alone"),
        ({"attention_resolutions": (16,)}, r"has attention_resolutions \(8,\), not \(16,\)"),
        ({"norm_num_groups": 16}, "has norm_num_groups 8, not 16"),
    ],
)
def test_another_architecture_says_where_it_differs(fields, message, make_unet):
    model = make_unet()
    with pytest.raises(ValueError, match=message):
        widen(model, twice(model.config, **fields))


def test_an_odd_width_cannot_be_widened(make_unet):
    model = make_unet(base_channels=15, norm_num_groups=5)
    with pytest.raises(ValueError, match="needs an even number of base_channels; it has 15"):
        widen(model, twice(model.config))
