"""What follows a convolution in a U-Net: the bias, a number for each image and channel, and the residual, in one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capturing import is_traced
from .dispatch import Implementation, choose, why_not_triton
from .measured import is_faster_on_gpu
from .torch_private import is_observed

__all__ = ["add_bias", "add_bias_reference", "adds_in_one_pass"]


def add_bias(
    image: Tensor, bias: Tensor | None = None, *, shift: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """image + bias + shift + residual.

    The Triton kernel reads and writes the image once, adds in float32 and rounds once. PyTorch makes a pass, and rounds, for
    each term. Under torch.compile the terms are PyTorch's, which it fuses into one pass by itself.

    Args:
        image: (N, C, H, W); float32, bfloat16, float16 or float64, contiguous or channels_last (others are copied). Where no
            gradient is recorded, the sum may be written over it.
        bias: (C,), in the dtype of ``image`` or float32.
        shift: (N, C), one number an image and channel, such as a time embedding; in either dtype. In the networks of this
            package the norm that follows adds it (``pre_shift`` of :func:`ddim_fast.group_norm_silu`), at no pass at all.
        residual: of the shape and dtype of ``image``.

    Returns:
        (N, C, H, W) in the dtype of ``image``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the tensor.
    """
    call = _Call(image, bias, shift, residual)
    _check(call)
    if is_traced() or is_observed():
        return _run_pytorch(call)
    return choose("add_bias", IMPLEMENTATIONS, call).run(call)


class _Call(NamedTuple):
    """The arguments of :func:`add_bias`."""

    image: Tensor
    bias: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None


def adds_in_one_pass(x: Tensor) -> bool:
    """Whether a convolution of ``x`` leaves its bias to :func:`add_bias`. Where PyTorch serves, the convolution adds it."""
    if is_traced() or is_observed():
        return False
    return choose("add_bias", IMPLEMENTATIONS, _Call(x)).backend == "triton"


def add_bias_reference(
    image: Tensor, bias: Tensor | None = None, *, shift: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """The operator in plain PyTorch: differentiable, on any device. Arguments as :func:`add_bias`."""
    if bias is not None:
        image = image + bias.to(image.dtype)[:, None, None]
    if shift is not None:
        image = image + shift.to(image.dtype)[:, :, None, None]
    return image if residual is None else image + residual


@torch.library.custom_op("ddim_fast::add_bias", mutates_args=())
def _registered(image: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    """The Triton kernel as autograd sees it: the result is a new tensor."""
    from ..kernels.add_bias import add_bias

    return add_bias(image, bias, shift, residual)


@_registered.register_fake
def _(image: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.empty_like(image, memory_format=_format(image))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[1:3]]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of the sum is that of image and residual; those of bias and shift add it up, in float32."""
    over = ((0, 2, 3), (2, 3))
    sums = [
        grad.sum(axes, dtype=dtype) if needed and dtype is not None else None
        for axes, dtype, needed in zip(over, ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
    ]
    return grad, *sums, grad if ctx.needs_input_grad[3] else None


_registered.register_autograd(_differentiate, setup_context=_save_for_backward)


def _run_triton(call: _Call) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call):
        return _registered(*call)
    from ..kernels.add_bias import add_bias

    image = call.image.contiguous(memory_format=_format(call.image))
    return add_bias(image, *call[1:], out=image)


def _why_not_triton(call: _Call) -> str | None:
    if call.image.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"it takes float32, bfloat16, float16 and float64, not {call.image.dtype}"
    return why_not_triton(call.image.device)


def _triton_is_faster(call: _Call) -> bool:
    image = call.image
    memory_format = "channels_last" if _format(image) == torch.channels_last else "contiguous"
    return is_faster_on_gpu("add_bias", image.device, image.dtype, memory_format)


def _run_pytorch(call: _Call) -> Tensor:
    return add_bias_reference(call.image, call.bias, shift=call.shift, residual=call.residual)


# PyTorch's sums serve under each other name, on any device: in C++ on a CPU, convolutions add their bias and residual.
IMPLEMENTATIONS = (
    Implementation("triton", _run_triton, _why_not_triton, _triton_is_faster),
    *(Implementation(backend, _run_pytorch, lambda call: None) for backend in ("native", "cuda", "reference")),
)


def _format(image: Tensor) -> torch.memory_format:
    is_channels_last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _check(call: _Call) -> None:
    image = call.image
    if image.ndim != 4 or not image.is_floating_point():
        raise ValueError(
            f"image must be a floating-point tensor of shape (N, C, H, W); got {image.dtype} of shape {tuple(image.shape)}"
        )
    shapes = {"bias": image.shape[1:2], "shift": image.shape[:2], "residual": image.shape}
    for (name, shape), tensor in zip(shapes.items(), call[1:], strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")
        if tensor.device != image.device:
            raise ValueError(f"{name} is on {tensor.device}, but image is on {image.device}")
        if tensor.dtype != image.dtype and (name == "residual" or tensor.dtype != torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}, but image is {image.dtype}")
