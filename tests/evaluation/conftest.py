import pytest
import torch

from ddim_fast.evaluation.inception import FeatureNetwork


@pytest.fixture
def tiny_network() -> FeatureNetwork:
    """A feature network of six features that is made in no time."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(12, 6), torch.nn.Tanh())
    return FeatureNetwork(layers, "tiny", 6, size=8)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ddim_fast"
