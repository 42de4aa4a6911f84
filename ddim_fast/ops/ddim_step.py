"""The DDIM step: x_t and the network's output -> x_prev, in one pass over memory."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.step import StepCoefficients, step_coefficients
from . import native
from .dispatch import Implementation, choose

__all__ = ["ddim_step", "ddim_step_reference", "fast_ddim_step"]


def fast_ddim_step(
    sample: Tensor,
    model_output: Tensor,
    alphas_cumprod_t: float | Tensor,
    alphas_cumprod_prev: float | Tensor,
    *,
    eta: float | str = 0.0,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    clip_sample_range: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of the DDIM sampler (Song et al. 2021, eq. 12), for any sampling loop.

    Args:
        sample: x_t, of any shape; float32, float64, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        model_output: the network's prediction at x_t, like ``sample``.
        alphas_cumprod_t: the share of signal variance in ``sample``: alphas_cumprod[t]. A float, a 0-dim tensor, or an (N,)
            tensor with one value an image. A tensor on the GPU is used there, without waiting for it.
        alphas_cumprod_prev: the same for the timestep that comes next in the run; 1.0 after the last one.
        eta: 0 deterministic, 1 the variance of DDPM, anything between, or ``"sigma-hat"`` for the paper's larger variance.
        noise: standard normal noise like ``sample``; needed when ``eta`` is not 0, not read when it is.
        prediction_type: what ``model_output`` is: ``epsilon``, ``v_prediction`` or ``sample``.
        clip_sample_range: clip the predicted x_0 to [-r, r] (epsilon stays as predicted); None does not clip.
        out: where the result goes, like ``sample``; may be one of the inputs. A new tensor by default.

    Returns:
        x_prev, in the dtype of ``sample``.

    Raises:
        ValueError: shapes, dtypes or devices differ, a value is out of range, or noise is missing.
    """
    stochastic = eta != 0
    if stochastic and noise is None:
        raise ValueError(f"eta = {eta} needs noise")
    if clip_sample_range is not None and not clip_sample_range > 0:
        raise ValueError(f"clip_sample_range must be positive, or None; got {clip_sample_range}")
    a, b = (_level(value, sample) for value in (alphas_cumprod_t, alphas_cumprod_prev))
    coefficients = step_coefficients(a, b, eta, prediction_type)
    return ddim_step(sample, model_output, coefficients, clip_sample_range, noise if stochastic else None, out)


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The step with its coefficients given, by the fastest implementation that can serve: see :class:`StepCoefficients`.

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
    coefficients: StepCoefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the operator means, in plain PyTorch: differentiable, any device, any layout."""
    c = coefficients
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    c = StepCoefficients(*(value.to(dtype) if isinstance(value, Tensor) else value for value in c))
    x, output = sample.to(dtype), model_output.to(dtype)
    x0 = c.x0_from_sample * x + c.x0_from_output * output
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    eps = c.eps_from_sample * x + c.eps_from_output * output
    result = c.prev_from_x0 * x0 + c.prev_from_eps * eps
    if noise is not None:
        result = result + c.sigma * noise.to(dtype)
    result = result.to(sample.dtype)
    return result if out is None else out.copy_(result)


class _Step(NamedTuple):
    """What an implementation is asked to do: the arguments of :func:`ddim_step`."""

    sample: Tensor
    model_output: Tensor
    coefficients: StepCoefficients
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
    if step.sample.device.type != "cuda":
        return f"it needs a GPU, and the sample is on {step.sample.device}"
    if step.sample.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return _why_not_one_pass(step)


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
    Implementation("triton", _run_triton, _why_not_triton),
    Implementation("cuda", _run_cuda, _why_not_cuda),
    Implementation("native", _run_native, _why_not_native),
    Implementation("reference", lambda step: ddim_step_reference(*step), lambda step: None),
)


def _level(value: float | Tensor, sample: Tensor) -> float | Tensor:
    """A noise level as a float where that is free, otherwise as a float64 tensor beside ``sample``."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.ndim == 0:
        return float(value) if value.device.type == "cpu" and not torch.compiler.is_compiling() else value.double()
    if value.ndim != 1 or sample.ndim == 0 or value.shape[0] not in (1, sample.shape[0]):
        raise ValueError(
            f"a noise level is one number or one an image; got shape {tuple(value.shape)} "
            f"for a sample of shape {tuple(sample.shape)}"
        )
    return value.to(sample.device, torch.float64).view(-1, *[1] * (sample.ndim - 1))


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
