"""Widening a trained network into one of twice the channels, with the same function."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .config import UNetConfig
from .unet import UNet

__all__ = ["widen"]

# What must be equal in a preset, after the channels have been doubled.
_ARCHITECTURE = (
    "sample_size",
    "in_channels",
    "base_channels",
    "channel_multipliers",
    "layers_per_block",
    "attention_resolutions",
    "attention_head_dim",
    "norm_num_groups",
)


@torch.no_grad()
def widen(model: UNet, architecture: UNetConfig) -> UNet:
    """The function of ``model`` by a network of twice the channels, in eval mode (Chen et al. 2016, "Net2Net").

    Channel c becomes the equal channels 2c and 2c + 1, so that the groups of a norm keep their mean and variance, and the
    weights of channel c are divided among the two. The time embedding gets the former frequencies, by a doubled ``freq_shift``,
    and others between them, whose weights start at zero.

    Args:
        model: the narrow network. Its process, classes and dropout stay.
        architecture: the wide network, such as a preset; it is only compared.

    Raises:
        ValueError: ``architecture`` is not ``model``'s with twice the channels; or ``model`` has an odd number of them.
    """
    narrow, head_dim = model.config, model.config.attention_head_dim
    if narrow.base_channels % 2:  # its time embedding ends in a zero
        raise ValueError(f"a network to widen needs an even number of base_channels; it has {narrow.base_channels}")
    config = dataclasses.replace(
        narrow,
        base_channels=2 * narrow.base_channels,
        attention_head_dim=None if head_dim is None else 2 * head_dim,
        freq_shift=2 * narrow.freq_shift,
    )
    for name in _ARCHITECTURE:
        wanted, given = getattr(config, name), getattr(architecture, name)
        if wanted != given:
            raise ValueError(
                f"a network of twice the channels has {name} {wanted}, not {given}; choose one that differs in width alone"
            )

    wide = UNet(config)
    old, generator = model.state_dict(), torch.Generator().manual_seed(0)
    for name, new in wide.state_dict().items():
        new.copy_(_widened(name, old[name], new.shape, generator))
    wide.audio = model.audio
    return wide.eval()


def _widened(name: str, weight: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name == "class_embedding.weight":
        return weight.repeat_interleave(2, dim=1)
    if ".to_q." in name or ".to_k." in name:
        weight = weight * 2**-0.25  # sums of twice as many products, and the scale of a head twice as large
    if name.endswith(".to_q.weight"):
        # Two equal queries would have equal gradients from the two equal keys, and these from them.
        weight = 2 * _divided(weight, 0, generator)
    elif shape[0] != weight.shape[0]:
        weight = weight.repeat_interleave(2, dim=0)
    if name == "time_embedding.linear_1.weight":
        return torch.stack((weight, torch.zeros_like(weight)), dim=2).flatten(1)
    return weight if shape == weight.shape else _divided(weight, 1, generator)


def _divided(weight: Tensor, axis: int, generator: torch.Generator) -> Tensor:
    """Each number as two along ``axis`` with this sum. Equal halves would give the two copies of a channel equal gradients for
    ever; shares that are equal for all of its weights, ones that differ by a factor, which Adam undoes."""
    first = weight * torch.rand(weight.shape, generator=generator)
    return torch.stack((first, weight - first), dim=axis + 1).flatten(axis, axis + 1)
