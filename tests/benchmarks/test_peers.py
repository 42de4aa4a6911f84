import sys

import peers
import pytest
import torch

from ddim_fast import UNet, UNetConfig

PRECISIONS = [("diffusers", "fp32"), ("diffusers", "bf16"), ("onnxruntime", "fp32"), ("openvino", "fp32")]


@pytest.fixture(scope="module")
def model():
    """A small network, all its weights random, with every kind of layer that diffusers' has too."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(sample_size=16, base_channels=32, channel_multipliers=(1, 2), layers_per_block=1))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval().requires_grad_(False).to(peers.DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "precision"), PRECISIONS)
@torch.no_grad()
def test_a_peer_evaluates_the_same_network(model, peer, precision):
    evaluate = peers.PEERS[peer](model, peers.DTYPES[precision], 3)
    x = torch.randn(3, 3, 16, 16, device=peers.DEVICE)
    for t in torch.tensor([0, 730], device=peers.DEVICE):
        prediction, exact = evaluate(x, t), model(x, t)
        assert prediction.shape == x.shape and prediction.dtype == torch.float32
        error = peers.relative_error(prediction, exact)
        assert error < 1e-5 if precision == "fp32" else 1e-4 < error < 3e-2


def test_a_missing_peer_is_skipped_by_name(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(pytest.skip.Exception, match="openvino"):
        peers.openvino(model, torch.float32, 3)


def test_what_a_peer_cannot_do_is_skipped_and_says_so(model):
    pytest.importorskip("onnxruntime")
    with pytest.raises(pytest.skip.Exception, match=r"ONNX Runtime is measured in float32 on the CPU, not in torch\.bfloat16"):
        peers.onnx_runtime(model, torch.bfloat16, 3)


def test_diffusers_has_the_schedule_too(model):
    scheduler = peers.pipeline(model).scheduler
    assert scheduler.config.beta_schedule == "linear" and not scheduler.config.clip_sample


@torch.no_grad()
def test_the_packaged_network_is_measured_without_a_class():
    measured, packaged = peers.network("fashion-mnist"), UNet.from_pretrained("fashion-mnist")
    assert measured.config.num_classes is None
    x, t = torch.randn(2, 1, 32, 32), torch.tensor(400)
    torch.testing.assert_close(measured(x.to(peers.DEVICE), t.to(peers.DEVICE)).cpu(), packaged(x, t))


@torch.no_grad()
def test_no_weight_of_a_fresh_network_is_zero():
    assert all(p.any() for p in peers.network("cifar10-64").parameters())


def test_relative_error():
    exact = torch.tensor([3.0, 4.0])
    assert peers.relative_error(exact + torch.tensor([0.03, -0.04]), exact) == pytest.approx(0.01)
