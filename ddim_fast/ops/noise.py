"""Seeded Gaussian noise: counter-based Philox4x32-10 (Salmon et al. 2011) and the Box-Muller transform.

The number drawn for element e of image ``seed`` at ``step`` depends on these three alone: not on the batch, the device or
what was drawn before. csrc/philox.h and kernels/ddim_step.py draw the same numbers inside their kernels.

The key is the seed; the counter is (block, step, 0, 0), block b giving elements 4b..4b+3 of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .scalars import is_whole, plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "INITIAL_NOISE",
    "box_muller",
    "check_seeds",
    "philox4x32",
    "seeded_noise",
    "seeded_noise_numpy",
    "seeded_words",
]

# The step number under which x_T is drawn; sampling steps count from 0.
INITIAL_NOISE = 0xFFFFFFFF

_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Any, ...], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Ten rounds of Philox on 32-bit words held in int64 tensors or arrays.

    Args:
        counter: four of them, broadcastable.
        key: two, broadcastable with them.

    Returns:
        Four of words in [0, 2^32). Bit-exact with Random123 on every device.
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

    Args:
        seeds: N integers in [0, 2^63).
        step: the number of the sampling step, or :data:`INITIAL_NOISE` for x_T.
        shape: (C, H, W) of one image.

    Returns:
        (N, C, H, W) float32 on ``device``.
    """
    import torch

    seeds = torch.as_tensor(seeds, dtype=torch.int64).to(device)[:, None]
    elements = math.prod(shape)
    block = torch.arange((elements + 3) // 4, device=device)[None, :]
    # float64: the same float32 comes out however a device vectorises log and cos, up to the rarest of ties.
    uniform = [(word.double() + 0.5) * 2.0**-32 for word in seeded_words(seeds, block, torch.zeros_like(block) + step)]
    normal = torch.stack(box_muller(torch, uniform), dim=-1)
    return normal.flatten(1)[:, :elements].float().reshape(len(seeds), *shape)


def seeded_noise_numpy(seeds: np.ndarray | Sequence[int], step: int, shape: Sequence[int]) -> np.ndarray:
    """:func:`seeded_noise` as a numpy array, without torch."""
    seeds = np.asarray(seeds, dtype=np.int64)[:, None]
    elements = math.prod(shape)
    block = np.arange((elements + 3) // 4)[None, :]
    uniform = [(word + 0.5) * 2.0**-32 for word in seeded_words(seeds, block, np.zeros_like(block) + step)]
    normal = np.stack(box_muller(np, uniform), axis=-1).reshape(len(seeds), 4 * block.size)
    return normal[:, :elements].astype(np.float32).reshape(len(seeds), *shape)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """``seeds``, a list, an array or a tensor, as Python's integers.

    Raises:
        ValueError: it is no list, or one is not a whole number in [0, 2^63).
    """
    try:
        checked = [plain(seed) for seed in (seeds.tolist() if hasattr(seeds, "tolist") else seeds)]
    except TypeError:
        raise ValueError(f"seeds are a list of whole numbers, one an image; got {seeds!r}") from None
    for seed in checked:
        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; got {seed!r}")
    return checked


def seeded_words(seeds: Any, block: Any, step: Any) -> tuple[Any, ...]:
    """The four words of each block of each image: int64, of shape (N, blocks).

    Args:
        seeds: (N, 1) int64.
        block: (1, blocks) int64, their numbers.
        step: the number of the step, like ``block`` or one for all.
    """
    zero = block & 0
    return philox4x32((block, step, zero, zero), (seeds & _MASK, (seeds >> 32) & _MASK))


def box_muller(library: Any, uniform: list[Any]) -> list[Any]:
    """Four independent normals from four numbers of (0, 1), with the functions sqrt, log, cos and sin of ``library``: torch,
    numpy, or another that has them."""
    normal = []
    for u, v in (uniform[:2], uniform[2:]):
        radius, angle = library.sqrt(-2 * library.log(u)), 2 * math.pi * v
        normal += [radius * library.cos(angle), radius * library.sin(angle)]
    return normal
