import pytest
import torch

from ddim_fast.models.growth import enclose


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"downsample_padding": 1},
        {"in_channels": 1, "sample_size": (8, 16), "layers_per_block": 2},
        {"num_classes": 3, "channel_multipliers": (2, 1), "attention_resolutions": (16, 32)},
    ],
)
def test_a_larger_network_begins_as_the_one_inside_it(fields, make_unet):
    model = make_unet(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    larger = enclose(model)
    height, width = model.config.size
    x, t = torch.randn(2, model.config.in_channels, 2 * height, 2 * width), torch.tensor([5, 700])
    labels = None if model.config.num_classes is None else torch.tensor([1, 3])
    first = 1 - model.config.downsample_padding
    expected = model(x[..., first::2, first::2].contiguous(), t, labels)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(larger(x, t, labels), 2), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_parameter_of_the_new_level_learns(make_unet):
    """Some have a gradient only after the zeros before or behind them have moved."""
    larger = enclose(make_unet()).train()
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    x = torch.randn(2, 3, 32, 32)
    for _ in range(3):
        optimizer.zero_grad()
        (larger(x, torch.tensor([5, 700])) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.any() for p in larger.parameters())


@pytest.mark.parametrize(
    "fields,size", [({"in_channels": 5}, "5x16x16"), ({"sample_size": (1, 16)}, "3x1x16")], ids=["narrow", "one-dimensional"]
)
def test_what_cannot_be_enclosed_says_why(fields, size, make_unet):
    with pytest.raises(ValueError, match=f"its images are {size}, and its first level has 16 channels"):
        enclose(make_unet(**fields))
