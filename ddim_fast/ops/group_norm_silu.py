"""GroupNorm, SiLU and what stands around them in a U-Net, in one operator."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .dispatch import Implementation, choose

__all__ = ["group_norm_silu", "group_norm_silu_reference"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """GroupNorm (Wu and He 2018) followed by SiLU, with the additions of a U-Net's residual block:

        v   = concat([x, skip], channels) + pre_shift
        y   = (v - mean) / sqrt(var + eps) * weight + bias
        y   = y * (1 + scale) + shift
        out = silu(y) + residual

    Statistics are float32 whatever the dtype, one for each image and group of channels.

    Args:
        x: (N, C_x, H, W); float32, bfloat16, float16 or float64, contiguous or channels_last (others are slower).
        num_groups: a divisor of C = C_x + C_skip.
        weight, bias: (C,), in the dtype of ``x`` or float32.
        eps: added to the variance.
        silu: whether to apply SiLU.
        pre_shift: (N, C) added to the input, one number a channel: the time embedding.
        scale, shift: (N, C) applied after the norm (FiLM, Perez et al. 2018); scale 0 changes nothing.
        residual: (N, C, H, W) added to the result.
        skip: (N, C_skip, H, W) that continues ``x`` along the channels, without the concatenation being made.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message names the tensor.
    """
    call = _Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip)
    _check(call)
    if torch.compiler.is_compiling():
        # Where there is a native kernel it beats the loops inductor makes of a norm; elsewhere, and where a gradient is to be
        # recorded, inductor fuses the reference with what stands around it. An export keeps the reference, too.
        use_op = x.device.type == "cpu" and native.module is not None and not _records_gradient(call)
        return _registered(*call) if use_op and not torch.compiler.is_exporting() else _reference(call)
    return choose("group_norm_silu", IMPLEMENTATIONS, call).run(call)


class _Call(NamedTuple):
    """The arguments of :func:`group_norm_silu`."""

    x: Tensor
    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float
    silu: bool
    pre_shift: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    skip: Tensor | None

    @property
    def channels(self) -> int:
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])


def group_norm_silu_reference(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, **options) -> Tensor:
    """What the operator means, in plain PyTorch: differentiable, on any device and layout. Arguments as
    :func:`group_norm_silu`."""
    defaults = dict.fromkeys(("pre_shift", "scale", "shift", "residual", "skip")) | {"silu": True}
    return _reference(_Call(x, num_groups, weight, bias, eps, **(defaults | options)))


@torch.library.custom_op("ddim_fast::group_norm_silu", mutates_args=())
def _registered(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    """The operator as torch.compile sees it: one node, dispatched when it runs."""
    call = _Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip)
    return choose("group_norm_silu", IMPLEMENTATIONS, call).run(call)


@_registered.register_fake
def _(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip) -> Tensor:
    return _empty_result(_Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip))


def _reference(call: _Call) -> Tensor:
    v = call.x if call.skip is None else torch.cat([call.x, call.skip], dim=1)
    if call.pre_shift is not None:
        v = v + call.pre_shift.to(v.dtype)[:, :, None, None]
    weight, bias = call.weight, call.bias
    if weight.dtype == v.dtype or v.device.type == "cpu":  # on a CPU, PyTorch takes float32 weights with bfloat16 images
        y = F.group_norm(v, call.num_groups, weight, bias, call.eps)
    else:
        y = F.group_norm(v.float(), call.num_groups, weight.float(), bias.float(), call.eps).to(v.dtype)
    if call.scale is not None:
        y = y * (1 + call.scale.to(y.dtype)[:, :, None, None])
    if call.shift is not None:
        y = y + call.shift.to(y.dtype)[:, :, None, None]
    if call.silu:
        y = F.silu(y)
    return y if call.residual is None else y + call.residual


def _run_native(call: _Call) -> Tensor:
    x = call.x
    channels_last = _is_channels_last(x)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = _empty_result(call)
    # Held in names, so that what was converted lives until the call is over.
    images = [None if t is None else t.contiguous(memory_format=layout) for t in (x, call.skip, call.residual)]
    numbers = [
        None if t is None else t.float().contiguous() for t in (call.weight, call.bias, call.pre_shift, call.scale, call.shift)
    ]
    native.module.group_norm_silu(
        [0 if t is None else t.data_ptr() for t in (*images, out, *numbers)],
        [x.shape[0], x.shape[1], call.channels - x.shape[1], x.shape[2] * x.shape[3], call.num_groups],
        call.eps,
        call.silu,
        channels_last,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def _why_not_native(call: _Call) -> str | None:
    if native.module is None:
        return native.why_not
    if call.x.device.type != "cpu" or call.x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on the CPU, not {call.x.dtype} on {call.x.device}"
    if _records_gradient(call):
        return "it records no gradient; use torch.no_grad()"
    return None


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _why_not_native),
    Implementation("reference", _reference, lambda call: None),
)


def _records_gradient(call: _Call) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call)


def _empty_result(call: _Call) -> Tensor:
    layout = torch.channels_last if _is_channels_last(call.x) else torch.contiguous_format
    shape = (call.x.shape[0], call.channels, *call.x.shape[2:])
    return torch.empty(shape, dtype=call.x.dtype, device=call.x.device, memory_format=layout)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _check(call: _Call) -> None:
    x = call.x
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor of shape (N, C, H, W); got {x.dtype} of shape {tuple(x.shape)}")
    n, channels = x.shape[0], call.channels
    image = (n, channels, *x.shape[2:])
    skip = (n, channels - x.shape[1], *x.shape[2:])
    expected = {"weight": (channels,), "bias": (channels,), "skip": skip, "residual": image}
    expected |= dict.fromkeys(("pre_shift", "scale", "shift"), (n, channels))
    for name, shape in expected.items():
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
        if not tensor.is_floating_point() or (name in ("skip", "residual") and tensor.dtype != x.dtype):
            raise ValueError(f"{name} is {tensor.dtype}, but x is {x.dtype}")
    if call.num_groups < 1 or channels % call.num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels; got {call.num_groups}")
    if not call.eps >= 0:
        raise ValueError(f"eps cannot be negative; got {call.eps}")
