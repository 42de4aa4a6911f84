import pytest
import torch

from ddim_fast import Sampler, UNet, UNetConfig
from ddim_fast.models import quantisation
from ddim_fast.models.quantisation import quantise
from ddim_fast.models.unet_blocks import Conv3x3
from ddim_fast.ops import native

pytestmark = pytest.mark.skipif(
    native.module is None or not native.module.conv3x3_has_int8(), reason="needs the native module and AVX-512 VNNI"
)


def convolutions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Conv3x3)}


def has_int8(module):
    return module.prepared[0].dtype == torch.int8


def test_samples_stay_near_those_in_float32():
    model = UNet.from_pretrained("fashion-mnist")
    request = {"seeds": range(6), "labels": [0, 2, 4, 6, 8, 9], "guidance": 2.0}
    exact = Sampler(model, steps=6).sample(**request)
    sampler = Sampler(model, steps=6, dtype=torch.int8)
    images = sampler.sample(**request)
    assert (images - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()
    assert torch.equal(sampler.sample(**request), images)
    again = Sampler(model, steps=6, dtype=torch.int8)
    assert torch.equal(again.sample(**request), images), "calibration is part of what the same seeds give"
    alone = [
        sampler.sample(seeds=[s], labels=label, guidance=2.0) for s, label in zip(range(6), request["labels"], strict=True)
    ]
    assert torch.equal(torch.cat(alone), images)


def test_sensitive_convolutions_keep_their_precision(small_unet, monkeypatch):
    x, t, labels = torch.randn(2, 3, 16, 16), torch.tensor(300), torch.tensor([1, 2])
    everything = small_unet.for_inference(torch.float32)
    monkeypatch.setattr(quantisation, "SENSITIVE", 1.0)
    errors = quantise(everything, lambda: everything(x, t, labels))
    assert errors.keys() == convolutions(everything).keys() and all(0 < e < 0.2 for e in errors.values())
    assert all(has_int8(m) for m in convolutions(everything).values())

    limit = sorted(errors.values())[len(errors) // 2]
    monkeypatch.setattr(quantisation, "SENSITIVE", limit)
    half = small_unet.for_inference(torch.float32)
    assert quantise(half, lambda: half(x, t, labels)) == errors
    assert {name for name, m in convolutions(half).items() if has_int8(m)} == {n for n, e in errors.items() if e <= limit}

    with torch.no_grad():
        exact = small_unet(x, t, labels)
        nearer, farther = ((m(x, t, labels) - exact).square().mean() for m in (half, everything))
    assert 0 < nearer < farther


def test_limits_are_those_of_the_whole_image():
    """Not of its left edge, which is where every sixteenth tile of this size lies."""
    torch.manual_seed(0)
    x = torch.randn(2, 128, 32, 32)
    x[..., :3] *= 0.1
    model = torch.nn.Sequential(Conv3x3(UNetConfig(sample_size=32), 128, 16))
    model[0].prepare(torch.float32)
    assert quantise(model, lambda: model(x))["0"] < 0.03


def test_each_error_is_that_of_its_convolution(small_unet):
    model = small_unet.for_inference(torch.float32)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(300)
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.setdefault(n, args[0])) for n, m in convolutions(model).items()
    ]
    errors = quantise(model, lambda: model(x, t))
    for hook in hooks:
        hook.remove()
    name = "mid_block.resnets.0.conv1"
    module = convolutions(model)[name]
    with torch.no_grad():
        exact = torch.nn.functional.conv2d(seen[name], module.weight, padding=1)
        error = (module(seen[name]) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error.item() == pytest.approx(errors[name], rel=1e-3)


@pytest.mark.slow
def test_compiles(small_unet):
    request = {"seeds": range(2), "labels": 3}
    eager = Sampler(small_unet, steps=2, dtype=torch.int8).sample(**request)
    compiled = Sampler(small_unet, steps=2, dtype=torch.int8, engine="compiled").sample(**request)
    assert (compiled - eager).square().mean().sqrt() < 0.01 * eager.square().mean().sqrt()


def test_other_networks_are_refused(fake_network):
    with pytest.raises(ValueError, match=r"int8 is for a ddim_fast.UNet on a CPU, not for FakeNetwork on cpu"):
        Sampler(fake_network(), steps=2, dtype=torch.int8)
