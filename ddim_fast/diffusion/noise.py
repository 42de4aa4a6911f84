"""Gaussian noise that belongs to a seed: counter-based Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform.

The number drawn for element e of image ``seed`` at ``step`` depends on these three alone: not on the batch, the device or
what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["INITIAL_NOISE", "philox4x32", "seeded_noise"]

# The step number under which x_T is drawn; sampling steps count from 0.
INITIAL_NOISE = 0xFFFFFFFF

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on 32-bit words held in int64 tensors.

    Args:
        counter: four tensors, broadcastable.
        key: two tensors, broadcastable with them.

    Returns:
        Four tensors of words in [0, 2^32). Bit-exact with Random123 on every device.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The int64 product wraps modulo 2^64, which keeps all the bits; the mask removes the shift's sign extension.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def seeded_noise(
    seeds: Tensor | Sequence[int], step: int | Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal noise, image i from ``seeds[i]`` alone.

    Philox's key is the seed; its counter is (block, step, 0, 0), block b giving elements 4b..4b+3 of the image.

    Args:
        seeds: N integers in [0, 2^63).
        step: the number of the sampling step, or :data:`INITIAL_NOISE` for x_T.
        shape: (C, H, W) of one image.

    Returns:
        (N, C, H, W) float32 on ``device``.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.int64).to(device)[:, None]
    elements = math.prod(shape)
    block = torch.arange((elements + 3) // 4, device=device)[None, :]
    zero = torch.zeros_like(block)
    words = philox4x32((block, zero + step, zero, zero), (seeds & _MASK, (seeds >> 32) & _MASK))
    # float64: the same float32 comes out however a device vectorises log and cos, up to the rarest of ties.
    u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
    r0, r1 = (torch.sqrt(-2 * torch.log(u)) for u in (u0, u2))
    a0, a1 = 2 * math.pi * u1, 2 * math.pi * u3
    normal = torch.stack([r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)], dim=-1)
    return normal.flatten(1)[:, :elements].float().unflatten(1, tuple(shape))
