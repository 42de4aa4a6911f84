"""What the tests share: a network that is a formula, and a small random U-Net."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ddim_fast import UNet, UNetConfig


class FakeNetwork(nn.Module):
    """A cheap, smooth, nonlinear stand-in for a trained network, with a U-Net's call and config."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.tensor([0.9, 0.3]))
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        self.calls.append(int(timesteps.reshape(-1)[0]))
        t = timesteps.float().reshape(-1, 1, 1, 1) / self.config.num_train_timesteps
        shift = 0.0 if labels is None else labels.float()[:, None, None, None] / 10
        return torch.tanh(self.weight[0] * x) + self.weight[1] * torch.sin(3 * t) + 0.05 * x.roll(1, -1) + shift


@pytest.fixture
def fake_network():
    """A function making a fake network; keywords are fields of its config."""

    def make(**fields) -> FakeNetwork:
        return FakeNetwork(UNetConfig(**{"sample_size": 8, "channel_multipliers": (1,), **fields}))

    return make


@pytest.fixture
def small_config() -> UNetConfig:
    """A class-conditional network small enough for tests, with every kind of layer."""
    return UNetConfig(
        sample_size=16,
        base_channels=16,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        attention_resolutions=(8,),
        norm_num_groups=8,
        dropout=0.1,
        num_classes=10,
        prediction_type="v_prediction",
    )


@pytest.fixture
def small_unet(small_config) -> UNet:
    """A U-Net whose weights are all random: the zeros of a fresh network would hide most mistakes."""
    torch.manual_seed(0)
    model = UNet(small_config)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()
