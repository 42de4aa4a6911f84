"""examples/ddim_in_60_lines.py: it is that short, and what it computes is DDIM."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from ddim_fast import Sampler, UNet

FILE = Path(__file__).parents[1] / "examples" / "ddim_in_60_lines.py"


@pytest.fixture(scope="module")
def ddim():
    spec = importlib.util.spec_from_file_location("ddim_in_60_lines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ddim


def test_it_fits_a_screen():
    assert len(FILE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_it_makes_the_images_of_the_sampler(prediction_type, ddim, small_config):
    torch.manual_seed(0)
    network = UNet(dataclasses.replace(small_config, prediction_type=prediction_type)).eval()
    sampler, labels = Sampler(network, steps=7), torch.tensor([1, 3])
    states = list(ddim(network, sampler.noise([5, 6]), labels, steps=7, guidance=2.0))
    expected = sampler.sample(seeds=[5, 6], labels=labels, guidance=2.0)
    torch.testing.assert_close(states[-1], expected, atol=1e-4, rtol=1e-4)
    assert len(states) == 7


def test_noise_is_fresh_where_eta_is_not_0(ddim, fake_network):
    network = fake_network(num_classes=4)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    first, second = (list(ddim(network, x, None, steps=3, eta=1.0)) for _ in range(2))
    assert first[-1].isfinite().all() and not torch.equal(first[0], second[0])
