"""Checkpoints of the DDIM authors' code (github.com/ermongroup/ddim): their own, and the published DDPM weights of Ho et al.
2020 in their format. The files hold tensors, but no description of the network.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...io.files import errors_name_file
from ..config import UNetConfig
from ..weights import Checkpoint, is_state_dict, read_pickle, read_safetensors

__all__ = ["load_ermongroup"]

# Parts of tensor names, ours and theirs; more specific ones first.
_NAMES = (
    ("time_embedding.linear_1", "temb.dense.0"),
    ("time_embedding.linear_2", "temb.dense.1"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("down_blocks", "down"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("resnets", "block"),
    ("attentions", "attn"),
    ("time_emb_proj", "temb_proj"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("conv_norm_out", "norm_out"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)

_ATTENTION_WEIGHT = re.compile(r"\.attn(\.\d+|_1)\.(q|k|v|proj_out)\.weight$")

# Every network they published has attention at this height only.
_ATTENTION_RESOLUTION = 16


def load_ermongroup(path: Path, config: UNetConfig | None = None) -> Checkpoint:
    """A checkpoint file: the network's tensors by name, or the list [network, optimizer, epoch, step, EMA] of their training.
    The EMA is used if there is one.

    Args:
        path: a file of ``torch.save``, or of safetensors if its name ends in ``.safetensors``.
        config: the network. None derives it from the tensors' shapes, with the defaults of their published networks for all
            other fields. The image size then follows from the only level with attention, 16 x 16 in all of those.

    Raises:
        ValueError: the file is damaged or holds another kind of network, or the image size cannot be derived.
    """
    stored = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    with errors_name_file(path):
        tensors = {name: _as_linear(name, tensor) for name, tensor in _network(stored).items()}
        config = config or _derive_config(tensors)
    return Checkpoint(path, config, tensors, partial(_stored_name, levels=len(config.channel_multipliers)))


def _network(stored: Any) -> dict[str, Tensor]:
    """The network's tensors, the averaged ones if the file has them."""
    if isinstance(stored, (list, tuple)) and stored:
        stored = stored[-1] if is_state_dict(stored[-1]) else stored[0]
    if not is_state_dict(stored):
        raise ValueError("neither a network's tensors by name nor a list that begins with them")
    if "time_embedding.linear_1.weight" in stored:
        raise ValueError("its configuration is in another file of its folder: give the folder")
    return {name.removeprefix("module."): tensor for name, tensor in stored.items()}


def _as_linear(name: str, tensor: Tensor) -> Tensor:
    """The weight of their attention's 1x1 convolution as a linear layer's."""
    is_1x1 = tensor.layout == torch.strided and tensor.shape[2:] == (1, 1)
    return tensor.flatten(1) if is_1x1 and _ATTENTION_WEIGHT.search(name) else tensor


def _derive_config(tensors: dict[str, Tensor]) -> UNetConfig:
    base, in_channels = _convolution_shape(tensors, "conv_in.weight")
    levels = max(1, _count(tensors, r"down\.(\d+)\."))
    widths = [_convolution_shape(tensors, f"down.{i}.block.0.conv1.weight")[0] for i in range(levels)]
    if widths[0] != base or any(width % base for width in widths):
        raise ValueError(f"levels of {widths} channels: the first must have the {base} of conv_in, the others multiples of it")
    attending = [i for i in range(levels) if any(name.startswith(f"down.{i}.attn.") for name in tensors)]
    if len(attending) != 1:
        raise ValueError(
            f"the image size cannot be told from a network with attention at {len(attending)} levels; "
            "load it with UNet.from_pretrained(FILE, config=UNetConfig(...))"
        )
    return UNetConfig(
        sample_size=_ATTENTION_RESOLUTION * 2 ** attending[0],
        in_channels=in_channels,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        layers_per_block=_count(tensors, r"down\.0\.block\.(\d+)\."),
        attention_resolutions=(_ATTENTION_RESOLUTION,),
    )


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """The number of different matches of the group in ``pattern``."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _convolution_shape(tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    """(output channels, input channels)"""
    if name not in tensors:
        raise ValueError(f"missing tensor {name!r}")
    if tensors[name].ndim != 4 or not tensors[name].numel():
        raise ValueError(f"tensor {name!r} has shape {tuple(tensors[name].shape)}, not the shape of a convolution")
    outputs, inputs = tensors[name].shape[:2]
    return outputs, inputs


def _stored_name(name: str, levels: int) -> str:
    """Their name of our tensor."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    # They number the way up by resolution, we by order of execution.
    return re.sub(r"^up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
