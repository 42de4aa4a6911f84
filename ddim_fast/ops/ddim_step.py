"""The DDIM step: x_t and the network's output -> x_prev, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .dispatch import Implementation, choose, why_not_triton

__all__ = ["Coefficients", "ddim_step", "ddim_step_reference"]

Coefficients = Sequence[float | Tensor]


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step with its seven coefficients (p, q, r, s, u, v, sigma), by the fastest implementation that can serve:

        x_0 = clip(p * sample + q * model_output)
        eps = r * sample + s * model_output
        out = u * x_0 + v * eps + sigma * noise

    Args:
        sample, model_output: of one floating-point dtype, any shape.
        coefficients: see :class:`ddim_fast.diffusion.step.StepCoefficients`; numbers, or tensors that broadcast.
        clip: bound on |x_0|, or None.
        noise: like ``sample``, or None to leave its term out.
        out: where the result goes, like ``sample``; may be one of the inputs.

    Raises:
        ValueError: shapes, dtypes or devices differ.
    """
    _check_tensors(sample, model_output=model_output, noise=noise, out=out)
    if torch.compiler.is_compiling():
        result = ddim_step_reference(sample, model_output, coefficients, clip, noise)
        return result if out is None else out.copy_(result)
    step = _Step(sample, model_output, coefficients, clip, noise, out)
    return choose("ddim_step", IMPLEMENTATIONS, step).run(step)


def ddim_step_reference(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the operator means, in plain PyTorch: differentiable, any device, any layout."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    p, q, r, s, u, v, sigma = (c.to(dtype) if isinstance(c, Tensor) else c for c in coefficients)
    x, output = sample.to(dtype), model_output.to(dtype)
    x0 = p * x + q * output
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    eps = r * x + s * output
    result = u * x0 + v * eps
    if noise is not None:
        result = result + sigma * noise.to(dtype)
    result = result.to(sample.dtype)
    return result if out is None else out.copy_(result)


class _Step(NamedTuple):
    """What an implementation is asked to do: the arguments of :func:`ddim_step`."""

    sample: Tensor
    model_output: Tensor
    coefficients: Coefficients
    clip: float | None
    noise: Tensor | None
    out: Tensor | None


def _run_native(step: _Step) -> Tensor:
    out = _result(step)
    native.module.ddim_step(*_addresses(step, out), torch.get_num_threads())
    return out


def _why_not_native(step: _Step) -> str | None:
    if native.module is None:
        return native.why_not
    if step.sample.device.type != "cpu" or step.sample.dtype != torch.float32:
        return f"it takes float32 on the CPU, not {step.sample.dtype} on {step.sample.device}"
    return _why_not_one_pass(step)


def _run_cuda(step: _Step) -> Tensor:
    out = _result(step)
    with torch.cuda.device_of(step.sample):
        native.module.ddim_step_cuda(*_addresses(step, out), torch.cuda.current_stream().cuda_stream)
    return out


def _why_not_cuda(step: _Step) -> str | None:
    if native.module is None:
        return native.why_not
    if not native.has_cuda:
        return "ddim_fast was built without nvcc"
    if step.sample.device.type != "cuda" or step.sample.dtype != torch.float32:
        return f"it takes float32 on a GPU, not {step.sample.dtype} on {step.sample.device}"
    return _why_not_one_pass(step)


def _run_triton(step: _Step) -> Tensor:
    from ..kernels.ddim_step import ddim_step

    return ddim_step(*step)


def _why_not_triton(step: _Step) -> str | None:
    if step.sample.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    return why_not_triton(step.sample.device) or _why_not_one_pass(step)


def _why_not_one_pass(step: _Step) -> str | None:
    """What every kernel needs: the same dense memory order throughout, plain numbers, and no gradient to record."""
    sample = step.sample
    tensors = [t for t in (sample, step.model_output, step.noise, step.out) if t is not None]
    if any(isinstance(value, Tensor) for value in step.coefficients):
        return "it takes the noise levels as numbers, not as tensors"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it records no gradient; use torch.no_grad()"
    if not torch.ops.aten.is_non_overlapping_and_dense(sample) or any(_order(t) != _order(sample) for t in tensors):
        return "it takes dense tensors of one memory layout"
    if any(t.dtype != sample.dtype for t in tensors):
        return "it takes tensors of one dtype"
    return None


def _result(step: _Step) -> Tensor:
    return torch.empty_like(step.sample) if step.out is None else step.out


def _addresses(step: _Step, out: Tensor) -> tuple[Any, ...]:
    """The arguments that the native module's functions share."""
    noise = 0 if step.noise is None else step.noise.data_ptr()
    clip = math.inf if step.clip is None else step.clip
    pointers = (step.sample.data_ptr(), step.model_output.data_ptr(), noise, out.data_ptr())
    return (*pointers, step.sample.numel(), step.coefficients, clip)


def _order(tensor: Tensor) -> list[int]:
    """The strides that matter: those of dimensions with more than one element."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _why_not_native),
    Implementation("triton", _run_triton, _why_not_triton, lambda step: step.sample.is_cuda),
    Implementation("cuda", _run_cuda, _why_not_cuda),
    Implementation("reference", lambda step: ddim_step_reference(*step), lambda step: None),
)


def _check_tensors(sample: Tensor, **others: Tensor | None) -> None:
    if not sample.is_floating_point():
        raise ValueError(f"sample must be a floating-point tensor; got {sample.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but sample has {tuple(sample.shape)}")
        if tensor.device != sample.device:
            raise ValueError(f"{name} is on {tensor.device}, but sample is on {sample.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    if others.get("out") is not None and others["out"].dtype != sample.dtype:
        raise ValueError(f"out is {others['out'].dtype}, but sample is {sample.dtype}")
