"""GroupNorm, SiLU and what stands around them in a U-Net, in one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .capturing import is_capturing
from .dispatch import Implementation, choose, why_not_triton
from .measured import is_faster_in_cpp
from .tensors import address, check_tensor, explain_refusal, resolved
from .torch_private import is_observed, is_transformed

__all__ = ["group_norm_silu", "group_norm_silu_reference"]


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
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
        weight, bias: (C,), in the dtype of ``x`` or float32; None is 1 and 0, as of a norm that is not affine.
        eps: added to the variance.
        silu: whether to apply SiLU.
        pre_shift: (N, C) added to the input, one number a channel: the time embedding.
        scale, shift: (N, C) applied after the norm (FiLM, Perez et al. 2018); scale 0 changes nothing.
        residual: (N, C, H, W) added to the result.
        skip: (N, C_skip, H, W) that continues ``x`` along the channels, without the concatenation being made.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``x``.

    Raises:
        ValueError: shapes, dtypes, layouts or devices do not fit; the message names the tensor.
        TypeError: an argument is no tensor.
    """
    call = _Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip)
    try:
        _check(call)
        if weight is None or bias is None:
            call = _with_parameters(call)
        if is_capturing():
            return _registered(*call)
        if torch.compiler.is_compiling():
            return _registered(*call) if _compiles_to_operator(call) else _reference(call)
        return choose("group_norm_silu", IMPLEMENTATIONS, call).run(call)
    except Exception as error:
        optional = {name: value for name, value in call._asdict().items() if name not in ("x", "num_groups", "eps", "silu")}
        explain_refusal("group_norm_silu", error, {"x": x}, optional, "num_groups or eps")
        raise


class _Call(NamedTuple):
    """The arguments of :func:`group_norm_silu`."""

    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
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


def _with_parameters(call: _Call) -> _Call:
    """The same call with a weight and a bias, which all implementations take."""
    weight, bias = call.weight, call.bias
    return call._replace(
        weight=call.x.new_ones(call.channels) if weight is None else weight,
        bias=call.x.new_zeros(call.channels) if bias is None else bias,
    )


def group_norm_silu_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, **options: Any
) -> Tensor:
    """The reference in plain PyTorch: differentiable, on any device and layout. Arguments as :func:`group_norm_silu`."""
    defaults: dict[str, Any] = dict.fromkeys(("pre_shift", "scale", "shift", "residual", "skip")) | {"silu": True}
    return _reference(_with_parameters(_Call(x, num_groups, weight, bias, eps, **(defaults | options))))


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
    """The operator as torch.compile and autograd see it: one node, dispatched when it runs."""
    call = _Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, residual, skip)
    return choose("group_norm_silu", IMPLEMENTATIONS, call).run(call)


@_registered.register_fake
def _(*arguments: Any) -> Tensor:
    return _empty_result(_Call(*arguments))


@torch.library.custom_op("ddim_fast::group_norm_silu_backward", mutates_args=())
def _registered_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
) -> list[Tensor]:
    """The gradients of x, weight, bias and whichever of pre_shift, scale, shift and skip there are, in this order."""
    call = _Call(x, num_groups, weight, bias, eps, silu, pre_shift, scale, shift, None, skip)
    request = _Backward(grad, call)
    return choose("group_norm_silu_backward", BACKWARD_IMPLEMENTATIONS, request).run(request)


@_registered_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> list[Tensor]:
    x, _, weight, bias, _, _, pre_shift, scale, shift, skip = arguments
    numbers = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in _given(weight, bias, pre_shift, scale, shift)]
    return [_empty_image(x, x.shape[1]), *numbers, *(_empty_image(x, t.shape[1]) for t in _given(skip))]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    call = _Call(*inputs)
    ctx.save_for_backward(call.x, call.weight, call.bias, call.pre_shift, call.scale, call.shift, call.skip)
    ctx.settings = call.num_groups, call.eps, call.silu
    ctx.has_residual = call.residual is not None


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the operator, or None."""
    x, weight, bias, *optional = ctx.saved_tensors
    num_groups, eps, silu = ctx.settings
    gradients = iter(_registered_backward(grad, x, num_groups, weight, bias, eps, silu, *optional))
    dx, dweight, dbias = (next(gradients) for _ in range(3))
    pre_shift, scale, shift, skip = (None if t is None else next(gradients) for t in optional)
    residual = grad if ctx.has_residual else None
    return dx, None, dweight, dbias, None, None, pre_shift, scale, shift, residual, skip


_registered.register_autograd(_differentiate, setup_context=_save_for_backward)


def _reference(call: _Call) -> Tensor:
    v = call.x if call.skip is None else torch.cat([call.x, call.skip], dim=1)
    if call.pre_shift is not None:
        v = v + call.pre_shift.to(v.dtype)[:, :, None, None]
    weight: Any = call.weight  # not None after _with_parameters
    bias: Any = call.bias
    if is_transformed() or (not v.requires_grad and (weight.requires_grad or bias.requires_grad)):
        # Of channels_last images PyTorch (2.13) has no forward-mode derivative, and reads beyond memory for the gradient of the
        # weights alone.
        v = v.contiguous()
    # On a CPU, PyTorch takes float32 weights with narrower images; what it exports then is no graph of ONNX.
    is_mixed = v.device.type == "cpu" and weight.dtype == bias.dtype == torch.float32 and v.dtype != torch.float64
    if weight.dtype == bias.dtype == v.dtype or (is_mixed and not is_observed()):
        y = F.group_norm(v, call.num_groups, weight, bias, call.eps)
    else:
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        y = F.group_norm(v.to(wide), call.num_groups, weight.to(wide), bias.to(wide), call.eps).to(v.dtype)
    if call.scale is not None:
        y = y * (1 + call.scale.to(y.dtype)[:, :, None, None])
    if call.shift is not None:
        y = y + call.shift.to(y.dtype)[:, :, None, None]
    if call.silu:
        y = F.silu(y)
    return y if call.residual is None else y + call.residual


class _Backward(NamedTuple):
    """The gradient of the result, and the call it is of."""

    grad: Tensor
    call: _Call


def _reference_backward(request: _Backward) -> list[Tensor]:
    """The chain rule in plain PyTorch, in float32 or, for float64, in that."""
    call = request.call
    wide = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    tensors = {name: t.to(wide) for name, t in call._asdict().items() if isinstance(t, Tensor)}

    def numbers(name: str) -> Any:
        return tensors[name].unflatten(-1, (-1, 1, 1)) if name in tensors else 0.0

    v = torch.cat([tensors[name] for name in ("x", "skip") if name in tensors], dim=1) + numbers("pre_shift")
    sizes = (v.shape[0], v.shape[1], v.shape[2] * v.shape[3], call.num_groups)
    v = v.contiguous()
    normalised, mean, rstd = torch.native_group_norm(v, None, None, *sizes, call.eps)
    affine = normalised * numbers("weight") + numbers("bias")
    film = 1.0 + numbers("scale")
    dy = request.grad.to(wide)
    if call.silu:
        dy = torch.ops.aten.silu_backward(dy, affine * film + numbers("shift"))
    gain = (film * numbers("weight")).expand_as(v)
    dv, _, _ = torch.ops.aten.native_group_norm_backward(
        (dy * gain).contiguous(), v, mean, rstd, None, *sizes, [True, False, False]
    )
    over_positions = {
        "weight": dy * film * normalised,
        "bias": dy * film,
        "pre_shift": dv,
        "scale": dy * affine,
        "shift": dy,
    }
    gradients = [_in_format_of(call.x, dv[:, : call.x.shape[1]].to(call.x.dtype, copy=True))]
    for name, values in over_positions.items():
        if (tensor := getattr(call, name)) is not None:
            gradients.append(values.sum((2, 3) if tensor.ndim == 2 else (0, 2, 3)).to(tensor.dtype))
    if call.skip is not None:
        gradients.append(_in_format_of(call.x, dv[:, call.x.shape[1] :].to(call.x.dtype, copy=True)))
    return gradients


def _run_reference(call: _Call) -> Tensor:
    result = _reference(call)
    return result if is_observed() else _in_format_of(call.x, result)  # torch.vmap does not say what a layout is


def _run_native(call: _Call) -> Tensor:
    pointers, sizes, stride, out, _alive = _arrays(call)
    settings = call.eps, call.silu, _is_channels_last(call.x), out.dtype == torch.bfloat16
    native.module.group_norm_silu(pointers, sizes, *settings, torch.get_num_threads(), pre_shift_stride=stride)
    return out


def _why_not_native(call: _Call) -> str | None:
    if native.module is None:
        return native.why_not
    if call.x.device.type != "cpu" or call.x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16 on the CPU, not {call.x.dtype} on {call.x.device}"
    return _why_no_gradient(call)


def _native_is_faster(call: _Call) -> bool:
    memory_format = "channels_last" if _is_channels_last(call.x) else "contiguous"
    return is_faster_in_cpp("group_norm_silu", call.x.dtype, memory_format)


_CUDA_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _run_cuda(call: _Call) -> Tensor:
    pointers, sizes, stride, out, _alive = _arrays(call)
    channels_last, dtype = _is_channels_last(call.x), _CUDA_DTYPES[call.x.dtype]
    with torch.cuda.device_of(call.x):
        size = native.module.group_norm_silu_cuda_workspace(sizes, channels_last, dtype)
        workspace = torch.empty(size, dtype=torch.uint8, device=call.x.device)
        settings = call.eps, call.silu, channels_last, dtype, workspace.data_ptr(), torch.cuda.current_stream().cuda_stream
        native.module.group_norm_silu_cuda(pointers, sizes, *settings, pre_shift_stride=stride)
    return out


def _why_not_cuda(call: _Call) -> str | None:
    if (reason := native.why_not_cuda()) is not None:
        return reason
    if call.x.device.type != "cuda" or call.x.dtype not in _CUDA_DTYPES:
        return f"it takes float32, bfloat16 and float16 on a GPU, not {call.x.dtype} on {call.x.device}"
    if call.channels // call.num_groups > 2048:
        return "it takes groups of up to 2048 channels"
    return _why_no_gradient(call)


def _run_triton(call: _Call) -> Tensor:
    if _records_gradient(call):
        return _registered(*call)  # comes back here without the gradients
    from ..kernels.group_norm_silu import group_norm_silu

    return group_norm_silu(*call)


def _why_not_triton(call: _Call) -> str | None:
    if call.x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return f"it takes float32, bfloat16, float16 and float64, not {call.x.dtype}"
    if call.channels * call.x.shape[2] * call.x.shape[3] >= 2**31:
        return "it takes images of less than 2**31 elements"
    if (reason := why_not_triton(call.x.device)) is not None:
        return reason
    from ..kernels.group_norm_tiles import why_not_group

    return why_not_group(call.channels // call.num_groups)


def _run_triton_backward(request: _Backward) -> list[Tensor]:
    from ..kernels.group_norm_silu_backward import group_norm_silu_backward

    arguments = request.call._asdict()
    del arguments["residual"]
    return _given(*group_norm_silu_backward(request.grad, **arguments))


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _why_not_native, _native_is_faster),
    Implementation("triton", _run_triton, _why_not_triton, lambda call: call.x.is_cuda),
    Implementation("cuda", _run_cuda, _why_not_cuda),
    Implementation("reference", _run_reference, lambda call: None),
)

BACKWARD_IMPLEMENTATIONS = (
    Implementation(
        "triton", _run_triton_backward, lambda request: _why_not_triton(request.call), lambda request: request.grad.is_cuda
    ),
    Implementation("reference", _reference_backward, lambda request: None),
)


def _compiles_to_operator(call: _Call) -> bool:
    """Where there is a kernel it beats the loops inductor makes of a norm. Elsewhere, and where a gradient is to be recorded
    on a CPU, inductor fuses the reference with what stands around it. An export keeps PyTorch's own operators, too."""
    if is_observed():
        return False
    return call.x.is_cuda or (call.x.device.type == "cpu" and native.module is not None and not _records_gradient(call))


def _records_gradient(call: _Call) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in call)


def _why_no_gradient(call: _Call) -> str | None:
    return "it records no gradient; use torch.no_grad()" if _records_gradient(call) else None


def _arrays(call: _Call) -> tuple[list[int], list[int], int, Tensor, list[Tensor | None]]:
    """The arguments of the native module's functions: pointers, sizes and the stride of pre_shift's rows; the result; and what
    must stay alive until they return."""
    x, skip, residual, pre_shift = call.x, call.skip, call.residual, call.pre_shift
    layout = _format(x)
    n, x_channels, height, width = x.shape
    channels = call.channels
    x = resolved(x).contiguous(memory_format=layout)
    if skip is None:
        out = torch.empty_like(x)
    else:
        skip = resolved(skip).contiguous(memory_format=layout)
        out = _empty_image(x, channels)
    if residual is not None:
        residual = resolved(residual).contiguous(memory_format=layout)
    stride = 0
    if pre_shift is not None:
        pre_shift = resolved(pre_shift).float()
        if pre_shift.stride(1) != 1:
            pre_shift = pre_shift.contiguous()
        stride = pre_shift.stride(0)  # rows of a larger table, or one row for all, stay where they are
    numbers = (_dense(call.weight), _dense(call.bias), pre_shift, _dense(call.scale), _dense(call.shift))
    tensors = [x, skip, residual, out, *numbers]
    pointers = [address(t) for t in tensors]
    return pointers, [n, x_channels, channels - x_channels, height * width, call.num_groups], stride, out, tensors


def _dense(numbers: Tensor | None) -> Tensor | None:
    """In float32, one after the other."""
    return None if numbers is None else resolved(numbers).float().contiguous()


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _empty_result(call: _Call) -> Tensor:
    return _empty_image(call.x, call.channels)


def _empty_image(x: Tensor, channels: int) -> Tensor:
    """In the memory format of ``x``, but with this many channels."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _in_format_of(x: Tensor, image: Tensor) -> Tensor:
    return image.contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _check(call: _Call) -> None:
    x = call.x
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point tensor of shape (N, C, H, W); got {x.dtype} of shape {tuple(x.shape)}")
    n, x_channels, height, width = x.shape
    channels = call.channels
    if call.weight is not None:
        check_tensor("weight", call.weight, (channels,), x)
    if call.bias is not None:
        check_tensor("bias", call.bias, (channels,), x)
    if call.pre_shift is not None:
        check_tensor("pre_shift", call.pre_shift, (n, channels), x)
    if call.scale is not None:
        check_tensor("scale", call.scale, (n, channels), x)
    if call.shift is not None:
        check_tensor("shift", call.shift, (n, channels), x)
    if call.residual is not None:
        check_tensor("residual", call.residual, (n, channels, height, width), x, like_x=True)
    if call.skip is not None:
        check_tensor("skip", call.skip, (n, channels - x_channels, height, width), x, like_x=True)
    if call.num_groups < 1 or channels % call.num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels; got {call.num_groups}")
    if not call.eps >= 0:
        raise ValueError(f"eps cannot be negative; got {call.eps}")
