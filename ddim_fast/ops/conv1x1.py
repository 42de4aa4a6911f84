"""The 1x1 convolution of a U-Net's shortcuts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv1x1"]


def conv1x1(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """A 1x1 convolution and a sum: in channels_last one matrix product that adds, without a further pass over memory.

    Args:
        x: (N, C, H, W).
        weight: (K, C, 1, 1), in the dtype of ``x``.
        added: (N, K, H, W), or None. Where no gradient is recorded, the sum may be written over it.

    Returns:
        (N, K, H, W).
    """
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight) if added is None else added + F.conv2d(x, weight)
    n, _, height, width = x.shape
    right = weight.flatten(1).t()
    if added is None:
        rows = _rows(x) @ right
    elif not torch.is_grad_enabled() and added.dtype == x.dtype == weight.dtype:
        rows = _rows(added).addmm_(_rows(x), right)  # without the copy that addmm makes of what it adds to
    else:  # autocast, under which dtypes differ, makes them one here, but not in place
        rows = torch.addmm(_rows(added), _rows(x), right)
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C), a view of a channels_last image."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)
