"""Interpolation of DDIM's starting noise along its sphere (Song et al. 2021, section 5.3)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .request import as_tensor

__all__ = ["between_all", "slerp", "slerp_grid"]


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical linear interpolation (Shoemake 1985; Song et al. 2021, eq. 67):

        sin((1 - t) theta) / sin(theta) a + sin(t theta) / sin(theta) b,    cos(theta) = a . b / (|a| |b|)

    Args:
        a, b: noise of one shape, such as (C, H, W).
        t: (T,), 0 for a to 1 for b.

    Returns:
        (T, ...) in the dtype of ``a``; at t = 0 and 1 exactly a and b. Parallel vectors give the straight line; so do opposite
        ones, which have no shortest arc.

    Raises:
        ValueError: the shapes differ.
    """
    a, b, t = map(as_tensor, (a, b, t))
    if a.shape != b.shape:
        raise ValueError(f"cannot interpolate from noise of shape {tuple(a.shape)} to {tuple(b.shape)}")
    x, y = a.double(), b.double()
    t = t.to(x).view(-1, *[1] * a.ndim)
    cosine = (x * y).sum() / (x.norm() * y.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    theta = torch.acos(cosine.clamp(-1, 1))
    if torch.sin(theta) < 1e-6:
        return ((1 - t) * x + t * y).to(a.dtype)
    between = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
    between = torch.where(t == 0, x, torch.where(t == 1, y, between))
    return between.to(a.dtype)


def between_all(points: Tensor, factor: int) -> Tensor:
    """Points that divide the arc from each point to the next into ``factor`` equal parts, by :func:`slerp`.

    Args:
        points: (N, ...) noise.

    Returns:
        ((N - 1) (factor - 1), ...), without the points themselves.
    """
    t = torch.linspace(0, 1, factor + 1, dtype=torch.float32)[1:-1]
    return torch.cat([slerp(a, b, t) for a, b in itertools.pairwise(points)])


def slerp_grid(corners: Tensor, rows: int, columns: int) -> Tensor:
    """Interpolation between four corners: along both sides first, then across.

    Args:
        corners: (4, ...) noise: top left, top right, bottom left, bottom right.

    Returns:
        (rows * columns, ...), a row after the other.
    """
    down, across = (torch.linspace(0, 1, count, dtype=torch.float32) for count in (rows, columns))
    left, right = slerp(corners[0], corners[2], down), slerp(corners[1], corners[3], down)
    return torch.cat([slerp(a, b, across) for a, b in zip(left, right, strict=True)])
