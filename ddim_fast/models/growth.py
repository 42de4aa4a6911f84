"""Growing a trained network into one for images twice as large."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from .unet import UNet

__all__ = ["enclose"]

# Along a side, the first convolution of the larger network shifts its image by one pixel forth or back: its kernel is 1 at
# index 0 or 2. For each index of the enclosed network's first kernel, the stride-2 convolution reads one of these shifts: the
# pixels 2i - 1, 2i + 1 and 2i + 3; with padding on both sides, 2i - 2, 2i and 2i + 2.
_SHIFTS = tuple(itertools.product((0, 2), repeat=2))
_READS = {0: ((0, 0), (2, 0), (2, 2)), 1: ((0, 0), (0, 2), (2, 2))}


@torch.no_grad()
def enclose(model: UNet) -> UNet:
    """A network for images twice as large: ``model`` with one more level around it, in eval mode.

    ``model`` sees every other pixel, ``x[..., 1::2, 1::2]`` (``x[..., ::2, ::2]`` where downsampling pads on both sides). Their
    noise is as strong as ``model`` expects at that timestep; averaged pixels would have half of it. The mean of each 2x2 pixels
    of the output is ``model``'s output. The new level is as wide as ``model``'s first one, and its residual branches start at
    zero, like a new network's.

    Raises:
        ValueError: ``model`` is one-dimensional, or its first level is too narrow for the pixels of its first convolution.
    """
    config, old = model.config, model.state_dict()
    channels, width = config.in_channels, config.level_channels[0]
    if config.one_dimensional or width < len(_SHIFTS) * channels:
        raise ValueError(
            f"a level around a network needs images of two dimensions and {len(_SHIFTS)} times their channels; "
            f"its images are {channels}x{config.size[0]}x{config.size[1]}, and its first level has {width} channels"
        )
    height, length = config.size
    multipliers = config.channel_multipliers
    larger = UNet(
        dataclasses.replace(config, sample_size=(2 * height, 2 * length), channel_multipliers=(multipliers[0], *multipliers))
    )
    new = larger.state_dict()
    for name, tensor in old.items():
        if name.startswith("down_blocks."):
            _, level, rest = name.split(".", 2)
            new[f"down_blocks.{int(level) + 1}.{rest}"].copy_(tensor)
        elif not name.startswith(("conv_in.", "conv_out.weight")):
            new[name].copy_(tensor)

    shifted = len(_SHIFTS) * channels  # the other channels of the first convolution belong to the new level
    first, halving = new["conv_in.weight"], new["down_blocks.0.downsamplers.0.conv.weight"].zero_()
    first[:shifted].zero_()
    new["conv_in.bias"][:shifted].zero_()
    of_shift = dict(zip(_SHIFTS, torch.arange(shifted).split(channels), strict=True))
    for (down, right), outputs in of_shift.items():
        first[outputs, torch.arange(channels), down, right] = 1
    reads = enumerate(_READS[config.downsample_padding])
    for (i, (down, row)), (j, (right, column)) in itertools.product(reads, repeat=2):
        halving[:, of_shift[down, right], row, column] = old["conv_in.weight"][:, :, i, j]
    new["down_blocks.0.downsamplers.0.conv.bias"].copy_(old["conv_in.bias"])

    # Features pass the new level unchanged, each pixel twice along a side.
    same = torch.eye(width)
    enlarging = f"up_blocks.{len(multipliers) - 1}.upsamplers.0.conv"
    new[f"{enlarging}.weight"].zero_()[:, :, 1, 1] = same
    new[f"{enlarging}.bias"].zero_()
    for i in range(config.layers_per_block + 1):
        shortcut = f"up_blocks.{len(multipliers)}.resnets.{i}.conv_shortcut"
        new[f"{shortcut}.weight"].zero_()[:, :width, 0, 0] = same
        new[f"{shortcut}.bias"].zero_()
    # On two equal pixels, a kernel (a, b, c) averages to b plus half of a and c, and to half of a or c for each neighbour. With
    # (2a, b - a - c, 2c) these become b, a and c.
    kernel = old["conv_out.weight"]
    for axis in (2, 3):
        a, b, c = kernel.unbind(axis)
        kernel = torch.stack((2 * a, b - a - c, 2 * c), axis)
    new["conv_out.weight"].copy_(kernel)
    return larger.eval()
