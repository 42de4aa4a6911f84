"""Checksums of networks."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from .config import ADVICE, DiffusionModel

if TYPE_CHECKING:
    from torch import nn

__all__ = ["weights_checksum"]


def weights_checksum(*models: DiffusionModel | nn.Module) -> str:
    """SHA-256 of networks' configurations and weights, in hexadecimal, independent of the file format."""
    import torch  # imported here, because commands without torch import this module

    digest = hashlib.sha256()
    for model in models:
        given: Any = model.config
        config = given.to_dict() if hasattr(given, "to_dict") else dict(given)
        # Private keys of diffusers' configs name the network's origin.
        decisive = {key: value for key, value in config.items() if key[0] != "_" and key not in ADVICE}
        digest.update(json.dumps(decisive, sort_keys=True).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
