"""The arguments of the convolution: what fits and what does not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KERNELS", "Prepared", "check", "check_prepared", "is_transposed", "result_shape"]

Prepared = tuple[Tensor, ...]

# Heights and widths of weights: of images, and of signals.
KERNELS = ((3, 3), (1, 3))


def is_transposed(prepared: Prepared) -> bool:
    """Whether the weights are a transposed convolution's, (C, K, 4, 4) instead of (components, K, C)."""
    return prepared[0].ndim == 4


def result_shape(x: Tensor, weight: Tensor, upsample: bool) -> tuple[int, int, int, int]:
    """The shape of the result; signals, with weights (K, C, 1, 3), are enlarged along their width."""
    n, _, height, width = x.shape
    return n, weight.shape[0], height * (2 if upsample and weight.shape[2] == 3 else 1), width * (1 + upsample)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> None:
    """Check what PyTorch's convolution, padded for a 3x3 kernel, would take otherwise."""
    shape = weight.shape
    if len(shape) != 4 or shape[2:] not in KERNELS or 0 in shape:
        raise ValueError(f"conv3x3: weight must have shape (K, C, 3, 3) or (K, C, 1, 3); got {tuple(shape)}")
    _check_images(x, shape[1])
    if 0 in x.shape[2:]:
        raise ValueError(f"conv3x3: x must have pixels; got {tuple(x.shape)}")
    if not x.is_floating_point() or x.device != weight.device or _differ(x, weight):
        raise ValueError(
            f"conv3x3: x must be a floating-point tensor like weight, {weight.dtype} on {weight.device}; "
            f"got {x.dtype} on {x.device}"
        )
    _check_added(x, shape[0], bias, residual, (2 if shape[2] == 3 else 1, 2) if upsample else (1, 1))


def check_prepared(x: Tensor, prepared: Prepared, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> None:
    weights, *scales = prepared
    shape, transposed = weights.shape, is_transposed(prepared)
    is_winograd = len(shape) == 3 and shape[0] in (16, 36) and weights.is_contiguous()
    if not (is_winograd or transposed) or (scales and (transposed or not _are_scales(scales, weights))):
        raise ValueError("prepared must be the result of prepare_conv3x3")
    _check_images(x, shape[0 if transposed else 2])
    fits = x.dtype in (torch.float32, torch.bfloat16) and (scales or x.dtype == weights.dtype)
    if transposed:
        fits = x.dtype == weights.dtype
    elif upsample and shape[0] == 36:
        raise ValueError("upsample is for weights that were prepared without a size")
    if not fits or x.device != weights.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, but the weights were prepared as {weights.dtype} on {weights.device}")
    down = 1 if transposed and shape[2] == 1 else 2
    _check_added(x, shape[1], bias, residual, (down, 2) if upsample else (1, 1))


def _check_images(x: Tensor, channels: int) -> None:
    shape = x.shape
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"conv3x3: x must have shape (N, {channels}, H, W) to fit the weights; got {tuple(shape)}")


def _are_scales(scales: list[Tensor], weights: Tensor) -> bool:
    """Whether they belong to weights of that dtype: those of 8-bit weights are as _prepare_native makes them."""
    shapes, dtypes = [(16,), (16, weights.shape[1]), (16, weights.shape[1])], [torch.float32, torch.float32, torch.int32]
    return (
        (weights.dtype, len(weights)) == (torch.int8, 16)
        and [tuple(t.shape) for t in scales] == shapes
        and [t.dtype for t in scales] == dtypes
        and all(t.is_contiguous() for t in scales)
    )


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have different dtypes that autocast does not make the same."""
    return one.dtype != other.dtype and not torch.is_autocast_enabled(one.device.type)


def _check_added(x: Tensor, channels: int, bias: Tensor | None, residual: Tensor | None, scale: tuple[int, int]) -> None:
    """Check what is added to the result, whose sides are ``scale`` times those of ``x``."""
    if bias is not None and (bias.shape != (channels,) or bias.device != x.device or not bias.is_floating_point()):
        raise ValueError(
            f"conv3x3: bias must have shape ({channels},) in a floating-point dtype on {x.device}; "
            f"got {tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        )
    if residual is None:
        return
    n, _, height, width = x.shape
    expected = (n, channels, scale[0] * height, scale[1] * width)
    if residual.shape != expected or residual.device != x.device or _differ(residual, x):
        raise ValueError(
            f"conv3x3: residual must have shape {expected} in {x.dtype} on {x.device}; "
            f"got {tuple(residual.shape)} in {residual.dtype} on {residual.device}"
        )
