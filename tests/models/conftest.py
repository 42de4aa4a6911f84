import dataclasses

import pytest
import torch

from ddim_fast import UNet


@pytest.fixture
def make_unet(small_config):
    """A function making a network whose weights are all random; keywords are fields of its config."""

    def make(**fields) -> UNet:
        torch.manual_seed(0)
        model = UNet(dataclasses.replace(small_config, **{"num_classes": None, **fields}))
        for p in model.parameters():
            if p.ndim == 1 or not p.any():
                torch.nn.init.normal_(p, mean=p.mean().item(), std=0.1)
        return model.eval()

    return make
