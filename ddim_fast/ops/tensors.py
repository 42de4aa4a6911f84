"""The tensors that operators take: everything else is refused by name, before its memory is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["address", "check_tensor", "explain_refusal", "have_one_order", "may_replace", "resolved"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins, for a native function; 0 for None.

    Raises:
        RuntimeError: it has elements and no memory: it was freed, or the tensor is a wrapper around others.
    """
    if tensor is None:
        return 0
    pointer = tensor.data_ptr()
    if pointer == 0 and tensor.numel():
        raise RuntimeError(f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory of its own")
    return pointer


def resolved(tensor: Tensor) -> Tensor:
    """The tensor with its numbers in memory as they are. Those of ``z.conj().imag`` lie there with the other sign, and
    ``contiguous`` leaves them so."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def have_one_order(tensors: list[Tensor]) -> bool:
    """Whether they are dense and of the same strides, but for dimensions of one element, whose strides do not matter."""
    orders = [[stride for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1] for t in tensors]
    return torch.ops.aten.is_non_overlapping_and_dense(tensors[0]) and all(order == orders[0] for order in orders)


def may_replace(out: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether dense ``out`` lies beside each of these inputs, or is that input, element by element."""
    first = out.data_ptr()
    end = first + out.nbytes
    for tensor in tensors:
        if tensor is out:
            continue
        other = tensor.data_ptr()
        if other < end and first < other + tensor.nbytes and not (first == other and out.dtype == tensor.dtype):
            return False
    return True


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, like_x: bool = False) -> None:
    """Check an argument that goes with ``x``.

    Args:
        like_x: whether it must be in the dtype of ``x``, rather than in any floating-point one.

    Raises:
        ValueError: it is of another shape or dtype, or on another device; the message names it.
    """
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {x.device}")
    if tensor.dtype != x.dtype and (like_x or not tensor.is_floating_point()):
        raise ValueError(f"{name} is {tensor.dtype}, but x is {x.dtype}")


def explain_refusal(
    operator: str, error: Exception, required: Mapping[str, Any], optional: Mapping[str, Any], others: str = ""
) -> None:
    """Say which argument of an operator is at fault, once it has failed: a call that succeeds pays nothing for it.

    Args:
        operator: its name.
        error: what it failed with. Where no argument is at fault, such as without memory, it stays as it is.
        required: its tensors, by name.
        optional: those that may be None.
        others: the names of its other arguments.

    Raises:
        TypeError: an argument is no tensor, or no number.
        ValueError: a tensor is not dense or not of a floating-point dtype, or ``error`` is a ValueError.
    """
    if isinstance(error, ValueError) and operator in str(error):  # of a call inside this one, or of what can serve it
        return
    tensors = {name: value for name, value in {**required, **optional}.items() if name in required or value is not None}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor; got {type(value).__name__}") from error
    if isinstance(error, ValueError):
        raise ValueError(f"{operator}: {error}") from error
    for name, value in tensors.items():
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise ValueError(f"{operator}: {name} is a {kind} tensor, and must be a dense one; convert it first") from error
        if value.dtype not in _FLOATS:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise ValueError(f"{operator}: {name} is {value.dtype}, and must be one of {names}") from error
        if value.device.type != "meta" and value.numel() and value.data_ptr() == 0:
            raise ValueError(f"{operator}: {name} is a {type(value).__name__} without memory of its own") from error
    if isinstance(error, IndexError):
        shapes = [f"{name} {tuple(value.shape)}" for name, value in tensors.items()]
        raise ValueError(f"{operator}: too few dimensions; got {', '.join(shapes)}") from error
    if isinstance(error, (AttributeError, TypeError)) and others:
        raise TypeError(f"{operator}: {others} is of a type that it does not take: {str(error).splitlines()[0]}") from error
