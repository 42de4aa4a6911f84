"""The DDIM step: x_t and the network's output -> x_prev, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .capturing import is_capturing, is_traced
from .ddim_step_numpy import check_settings
from .dispatch import Implementation, choose, why_not_triton
from .measured import is_faster_in_cpp
from .noise import seeded_noise
from .tensors import address, explain_refusal, have_one_order, may_replace
from .torch_private import is_observed

__all__ = ["Coefficients", "ddim_step", "ddim_step_reference"]

Coefficients = Sequence[float | Tensor] | Tensor


def ddim_step(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
    *,
    unconditional: Tensor | None = None,
    guidance: float | None = None,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One step with its seven coefficients (p, q, r, s, u, v, sigma), by the fastest implementation that can serve:

        m   = unconditional + guidance * (model_output - unconditional)
        x_0 = clip(p * sample + q * m)
        eps = r * sample + s * m
        out = u * x_0 + v * eps + sigma * noise

    Arithmetic is in float32 (float64 for a float64 sample), each operation rounded by itself in this order, then once to the
    result's dtype: every implementation that is given the noise returns the same bits.

    Args:
        sample, model_output: floating-point tensors of one shape.
        coefficients: see :class:`ddim_fast.diffusion.step.StepCoefficients`; seven numbers, or tensors that broadcast, or a
            table: a float32 tensor of shape (S, 7) on the sample's device, of which row ``step`` counts. One captured CUDA
            graph with a table serves every step; a row that is not there gives NaN on a GPU.
        clip: bound on the absolute x_0, or None.
        noise: like ``sample``, or None to leave its term out.
        out: where the result goes, of the sample's shape; may be one of the inputs.
        unconditional: the network's output without its condition, for classifier-free guidance; None leaves out the first line.
            It is for :func:`ddim_fast.fast_ddim_step` in other loops. Ours guides before the step:
            :func:`ddim_fast.diffusion.guidance.apply_guidance` says why.
        guidance: the scale that goes with it.
        seeds: (N,) int64 beside the sample, one an image, instead of ``noise``: :func:`ddim_fast.seeded_noise` of ``step``,
            made on the spot (on a GPU equal to it to a few units in the last place).
        step: number of the sampling step; an int64 tensor of one element where ``coefficients`` is a table.
        out_dtype: of the result, where ``out`` is not given; the sample's by default.

    Returns:
        x_prev, ``out`` where it is given.

    Raises:
        ValueError: shapes, dtypes, layouts or devices differ, or arguments do not belong together; the message names the
            argument.
        TypeError: an argument is no tensor.
    """
    try:
        out_dtype = out_dtype or (sample.dtype if out is None else out.dtype)
        call = _Step(sample, model_output, coefficients, clip, noise, unconditional, guidance, seeds, step, out_dtype)
        _check(call, out)
        if is_traced():
            # Inductor makes one pass of the reference by itself; what it cannot is to draw noise at the kernels' price.
            use_op = (seeds is not None or is_capturing()) and not is_observed() and not _has_loose_tensors(coefficients)
            result = _registered(*_flat(call)) if use_op else _reference(call)
            return result if out is None else out.copy_(result)
        return choose("ddim_step", IMPLEMENTATIONS, (call, out)).run((call, out))
    except Exception as error:
        images = {"sample": sample, "model_output": model_output}
        optional = {"noise": noise, "unconditional": unconditional, "out": out}
        explain_refusal("ddim_step", error, images, optional, "coefficients, clip, guidance, seeds or step")
        raise


class _Step(NamedTuple):
    """The arguments of :func:`ddim_step`; an implementation is asked to serve them and an ``out``, which may be None."""

    sample: Tensor
    model_output: Tensor
    coefficients: Coefficients
    clip: float | None
    noise: Tensor | None
    unconditional: Tensor | None
    guidance: float | None
    seeds: Tensor | None
    step: int | Tensor
    out_dtype: torch.dtype

    @property
    def table(self) -> Tensor | None:
        return self.coefficients if isinstance(self.coefficients, Tensor) else None

    @property
    def images(self) -> list[Tensor]:
        """Every tensor of the sample's shape."""
        return [t for t in (self.sample, self.model_output, self.noise, self.unconditional) if t is not None]


def ddim_step_reference(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Coefficients,
    clip: float | None = None,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """The reference in plain PyTorch: differentiable, any device, any layout. Arguments as :func:`ddim_step`."""
    defaults = {"unconditional": None, "guidance": None, "seeds": None, "step": 0}
    return _reference(
        _Step(sample, model_output, coefficients, clip, noise, **(defaults | options), out_dtype=out_dtype or sample.dtype)
    )


def _reference(call: _Step) -> Tensor:
    sample = call.sample
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    p, q, r, s, u, v, sigma = (c.to(dtype) if isinstance(c, Tensor) else c for c in _row(call.coefficients, call.step))
    x, m = sample.to(dtype), _guided(call.model_output, call.unconditional, call.guidance, dtype)
    x0 = p * x + q * m
    if call.clip is not None:
        x0 = x0.clamp(-call.clip, call.clip)
    eps = r * x + s * m
    result = u * x0 + v * eps
    noise = call.noise
    if call.seeds is not None:
        noise = seeded_noise(call.seeds, call.step, sample.shape[1:], sample.device)
    if noise is not None:
        result = result + sigma * noise.to(dtype)
    return result.to(call.out_dtype)


def _row(coefficients: Coefficients, step: Any) -> Sequence[float | Tensor]:
    """The seven coefficients; of a table, without a word to the host."""
    if not isinstance(coefficients, Tensor):
        return coefficients
    step = step.reshape(1)
    valid = (step >= 0) & (step < len(coefficients))
    row = coefficients.index_select(0, step.clamp(0, len(coefficients) - 1))[0]
    return torch.where(valid, row, math.nan).unbind()


def _guided(output: Tensor, unconditional: Tensor | None, guidance: Any, dtype: torch.dtype) -> Tensor:
    """The network's outputs combined."""
    if unconditional is None:
        return output.to(dtype)
    return unconditional.to(dtype) + guidance * (output.to(dtype) - unconditional.to(dtype))


_Request = tuple[_Step, Tensor | None]


def _run_native(request: _Request) -> Tensor:
    call, out = request
    out = _result(call, out)
    # On a CPU the index of a table's row is there to be read.
    step = int(call.step)
    coefficients = call.coefficients if call.table is None else call.table[step].tolist()
    pointers, options = _addresses(call, out)
    native.module.ddim_step(*pointers, coefficients, _bound(call), torch.get_num_threads(), step=step, **options)
    return out


def _why_not_native(request: _Request) -> str | None:
    if native.module is None:
        return native.why_not
    return _why_not_compiled(request, "cpu", (torch.float32, torch.bfloat16))


def _native_is_faster(request: _Request) -> bool:
    return is_faster_in_cpp("ddim_step", request[0].sample.dtype, "contiguous")


def _run_cuda(request: _Request) -> Tensor:
    call, out = request
    out = _result(call, out)
    pointers, options = _addresses(call, out)
    coefficients = [0.0] * 7 if call.table is not None else call.coefficients
    step: Any = call.step
    if call.table is None:
        options["step"] = step
    else:
        options |= {"table_ptr": call.table.data_ptr(), "table_rows": len(call.table), "index_ptr": step.data_ptr()}
    with torch.cuda.device_of(call.sample):
        stream = torch.cuda.current_stream().cuda_stream
        native.module.ddim_step_cuda(*pointers, coefficients, _bound(call), stream, **options)
    return out


def _why_not_cuda(request: _Request) -> str | None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return native.why_not_cuda() or _why_not_compiled(request, "cuda", dtypes)


def _run_triton(request: _Request) -> Tensor:
    from ..kernels.ddim_step import ddim_step

    call, out = request
    return ddim_step(
        call.sample,
        call.model_output,
        call.coefficients,
        call.clip,
        call.noise,
        out,
        unconditional=call.unconditional,
        guidance=1.0 if call.guidance is None else call.guidance,
        seeds=call.seeds,
        step=call.step,
        out_dtype=call.out_dtype,
    )


def _why_not_triton(request: _Request) -> str | None:
    call, out = request
    if any(t.dtype == torch.float64 for t in call.images) or call.out_dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    return why_not_triton(call.sample.device) or _why_not_one_pass(call, out)


def _why_not_compiled(request: _Request, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The arguments that the native functions for CPU and CUDA share."""
    call, out = request
    sample, noise, unconditional = call.sample, call.noise, call.unconditional
    if sample.device.type != device or not {sample.dtype, call.model_output.dtype, call.out_dtype} <= set(dtypes):
        names = " and ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"it takes {names} on a {device} device, not {sample.dtype} on {sample.device}"
    if noise is not None and noise.dtype != sample.dtype:
        return f"it takes noise of the sample's dtype, not {noise.dtype} beside {sample.dtype}"
    if unconditional is not None and unconditional.dtype != call.model_output.dtype:
        return f"it takes two outputs of one dtype, not {unconditional.dtype} beside {call.model_output.dtype}"
    return _why_not_one_pass(call, out)


def _why_not_one_pass(call: _Step, out: Tensor | None) -> str | None:
    """The requirements of every kernel: one dense memory order throughout, plain numbers, and no gradient to record."""
    sample = call.sample
    if _has_loose_tensors(call.coefficients):
        return "it takes the noise levels as numbers or as a table, not as tensors"
    if _records_gradient(call):
        return "it records no gradient; use torch.no_grad()"
    tensors = call.images if out is None else [*call.images, out]
    if not all(t.is_contiguous() for t in tensors) and not have_one_order(tensors):
        return "it takes dense tensors of one memory layout"
    for tensor in tensors:
        if tensor.is_neg():
            return "it takes numbers that lie in memory with their own sign"
    if out is not None and not may_replace(out, call.images if call.seeds is None else [*call.images, call.seeds]):
        return "it writes over an input only where it reads each number from the place that it is written to"
    if call.seeds is not None and not sample.is_contiguous():
        return "it draws the noise of contiguous images only"
    return None


def _has_loose_tensors(coefficients: Coefficients) -> bool:
    return not isinstance(coefficients, Tensor) and any(isinstance(c, Tensor) for c in coefficients)


def _records_gradient(call: _Step) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in call.images)


def _result(call: _Step, out: Tensor | None) -> Tensor:
    return torch.empty_like(call.sample, dtype=call.out_dtype) if out is None else out


def _bound(call: _Step) -> float:
    return math.inf if call.clip is None else call.clip


_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _addresses(call: _Step, out: Tensor) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The arguments that the native module's functions share: the first five, and those with names."""
    sample, output = call.sample, call.model_output
    options: dict[str, Any] = {"dtypes": tuple(_DTYPE_CODES[d] for d in (sample.dtype, output.dtype, out.dtype))}
    if call.unconditional is not None:
        options |= {"unconditional_ptr": address(call.unconditional), "guidance": call.guidance}
    if call.seeds is not None:
        options |= {"seeds_ptr": address(call.seeds), "image_numel": math.prod(sample.shape[1:])}
    return (address(sample), address(output), address(call.noise), address(out), sample.numel()), options


def _run_reference(request: _Request) -> Tensor:
    call, out = request
    result = _reference(call)
    return result if out is None else out.copy_(result)


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _why_not_native, _native_is_faster),
    Implementation("triton", _run_triton, _why_not_triton, lambda request: request[0].sample.is_cuda),
    Implementation("cuda", _run_cuda, _why_not_cuda),
    Implementation("reference", _run_reference, lambda request: None),
)


@torch.library.custom_op("ddim_fast::ddim_step", mutates_args=())
def _registered(
    sample: Tensor,
    model_output: Tensor,
    coefficients: Sequence[float],
    table: Tensor | None,
    clip: float | None,
    noise: Tensor | None,
    unconditional: Tensor | None,
    guidance: float | None,
    seeds: Tensor | None,
    step: int,
    step_index: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The operator as torch.compile sees it: one node, dispatched when it runs. A table comes with its index."""
    call = _Step(
        sample,
        model_output,
        coefficients if table is None else table,
        clip,
        noise,
        unconditional,
        guidance,
        seeds,
        step if step_index is None else step_index,
        out_dtype,
    )
    return choose("ddim_step", IMPLEMENTATIONS, (call, None)).run((call, None))


@_registered.register_fake
def _(sample: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(sample, dtype=others[-1])


def _flat(call: _Step) -> tuple[Any, ...]:
    """A step as the registered operator takes it."""
    coefficients = [] if call.table is not None else list(call.coefficients)
    step, index = (0, call.step) if isinstance(call.step, Tensor) else (call.step, None)
    return (*call[:2], coefficients, call.table, *call[3:8], step, index, call.out_dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sample, model_output, coefficients, table, clip, noise, unconditional, guidance, _, _, index, _ = inputs
    ctx.save_for_backward(sample, model_output, table, noise, unconditional, index)
    ctx.numbers = coefficients, clip, guidance


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sample, model_output, table, noise, unconditional, index = ctx.saved_tensors
    coefficients, clip, guidance = ctx.numbers
    p, q, r, s, u, v, sigma = _row(coefficients if table is None else table, index)
    g = grad.to(torch.float64 if sample.dtype == torch.float64 else torch.float32)
    from_x0 = u * g
    if clip is not None:
        m = _guided(model_output, unconditional, guidance, g.dtype)
        from_x0 = torch.where((p * sample.to(g.dtype) + q * m).abs() <= clip, from_x0, 0)
    from_output = q * from_x0 + s * v * g
    to_sample = (p * from_x0 + r * v * g).to(sample.dtype)
    to_noise = None if noise is None else (sigma * g).to(noise.dtype)
    to_unconditional = None
    if unconditional is not None:
        to_unconditional = ((1 - guidance) * from_output).to(unconditional.dtype)
        from_output = guidance * from_output
    to_output = from_output.to(model_output.dtype)
    return to_sample, to_output, None, None, None, to_noise, to_unconditional, None, None, None, None, None


_registered.register_autograd(_backward, setup_context=_save_for_backward)


def _check(call: _Step, out: Tensor | None) -> None:
    sample = call.sample
    if not sample.is_floating_point():
        raise ValueError(f"sample must be a floating-point tensor; got {sample.dtype}")
    images = {"model_output": call.model_output, "noise": call.noise, "unconditional": call.unconditional, "out": out}
    for name, tensor in images.items():
        if tensor is None:
            continue
        if tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but sample has {tuple(sample.shape)}")
        if tensor.device != sample.device:
            raise ValueError(f"{name} is on {tensor.device}, but sample is on {sample.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    if out is not None and 0 in out.stride() and not torch.ops.aten.is_non_overlapping_and_dense(out):
        raise ValueError(f"out of shape {tuple(out.shape)} and strides {out.stride()} has one place for several numbers")
    if out is not None and out.requires_grad and out.is_leaf and torch.is_grad_enabled():
        raise ValueError("out is a leaf that records a gradient, and would be written over; use torch.no_grad()")
    if not call.out_dtype.is_floating_point or (out is not None and out.dtype != call.out_dtype):
        raise ValueError(f"out_dtype must be a floating-point dtype, that of out where it is given; got {call.out_dtype}")
    check_settings(call.clip, call.noise, call.unconditional, call.guidance, call.seeds)
    _check_coefficients(call)
    _check_seeds(call)


def _check_coefficients(call: _Step) -> None:
    table, device = call.table, call.sample.device
    if table is None:
        if len(call.coefficients) != 7:
            raise ValueError(f"coefficients has {len(call.coefficients)} values instead of 7")
        if isinstance(call.step, Tensor):
            raise ValueError("step is a tensor only where coefficients is a table of shape (S, 7)")
        return
    if table.ndim != 2 or table.shape[1] != 7 or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"a table of coefficients is float32 of shape (S, 7); got {table.dtype} of {tuple(table.shape)}")
    step = call.step
    if not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.int64:
        raise ValueError("with a table of coefficients, step must be an int64 tensor of one element")
    for name, tensor in (("coefficients", table), ("step", step)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but sample is on {device}")
    if device.type == "cpu" and not is_traced() and not 0 <= int(step) < len(table):
        raise ValueError(f"step is {int(step)}, but the table of coefficients has rows 0 to {len(table) - 1}")


def _check_seeds(call: _Step) -> None:
    sample, seeds = call.sample, call.seeds
    if seeds is None:
        return
    if sample.ndim == 0 or seeds.dtype != torch.int64 or tuple(seeds.shape) != (len(sample),):
        raise ValueError(
            f"seeds must be int64, one an image of a sample of shape {tuple(sample.shape)}; "
            f"got {seeds.dtype} of shape {tuple(seeds.shape)}"
        )
    if seeds.device != sample.device:
        raise ValueError(f"seeds is on {seeds.device}, but sample is on {sample.device}")
    if not seeds.is_contiguous():
        raise ValueError("seeds must be contiguous")
