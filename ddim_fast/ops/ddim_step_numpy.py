"""The DDIM step on numpy arrays, for programs without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..io.processes import cpu_threads
from . import native
from .dispatch import Implementation, choose
from .noise import seeded_noise_numpy

__all__ = ["check_settings", "ddim_step_numpy"]


def ddim_step_numpy(
    sample: np.ndarray,
    model_output: np.ndarray,
    coefficients: Sequence[Any],
    clip: float | None = None,
    noise: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    unconditional: np.ndarray | None = None,
    guidance: float | None = None,
    seeds: np.ndarray | None = None,
    step: int = 0,
    out_dtype: Any = None,
) -> np.ndarray:
    """:func:`ddim_fast.ops.ddim_step.ddim_step` for arrays of float16, float32 or float64, with the same bits.

    ``coefficients`` are numbers or arrays that broadcast; ``seeds`` an int64 array, one an image.

    Raises:
        ValueError: shapes or dtypes differ, or arguments do not belong together; the message names the argument.
    """
    if out is None:
        out = np.empty(sample.shape, sample.dtype if out_dtype is None else out_dtype)
    call = _Step(sample, model_output, coefficients, clip, noise, unconditional, guidance, seeds, step, out)
    _check(call, out_dtype)
    choose("ddim_step", IMPLEMENTATIONS, call).run(call)
    return out


class _Step(NamedTuple):
    """The arguments of :func:`ddim_step_numpy`."""

    sample: np.ndarray
    model_output: np.ndarray
    coefficients: Sequence[Any]
    clip: float | None
    noise: np.ndarray | None
    unconditional: np.ndarray | None
    guidance: float | None
    seeds: np.ndarray | None
    step: int
    out: np.ndarray

    @property
    def images(self) -> dict[str, np.ndarray]:
        """Every array of the sample's shape, by its name."""
        names = ("sample", "model_output", "noise", "unconditional", "out")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _reference(call: _Step) -> None:
    dtype = np.float64 if call.sample.dtype == np.float64 else np.float32
    p, q, r, s, u, v, sigma = (np.asarray(c, dtype) for c in call.coefficients)
    x, m = call.sample.astype(dtype), call.model_output.astype(dtype)
    if call.unconditional is not None:
        unconditional = call.unconditional.astype(dtype)
        m = unconditional + dtype(call.guidance) * (m - unconditional)
    x0 = p * x + q * m
    if call.clip is not None:
        x0 = np.clip(x0, -call.clip, call.clip)
    result = u * x0 + v * (r * x + s * m)
    noise = call.noise
    if call.seeds is not None:
        noise = seeded_noise_numpy(call.seeds, call.step, x.shape[1:])
    if noise is not None:
        result = result + sigma * noise.astype(dtype)
    call.out[...] = result


def _run_native(call: _Step) -> None:
    def address(array: np.ndarray | None) -> int:
        return 0 if array is None else array.ctypes.data

    native.module.ddim_step(
        *map(address, (call.sample, call.model_output, call.noise, call.out)),
        call.sample.size,
        [float(c) for c in call.coefficients],
        math.inf if call.clip is None else call.clip,
        cpu_threads(),
        unconditional_ptr=address(call.unconditional),
        guidance=1.0 if call.guidance is None else call.guidance,
        seeds_ptr=address(call.seeds),
        image_numel=0 if call.seeds is None else math.prod(call.sample.shape[1:]),
        step=call.step,
    )


def _why_not_native(call: _Step) -> str | None:
    if native.module is None:
        return native.why_not
    if any(np.ndim(c) for c in call.coefficients):
        return "it takes the noise levels as numbers, not as arrays"
    for name, array in call.images.items():
        if array.dtype != np.float32 or not array.flags.c_contiguous or not array.flags.aligned:
            return f"it takes contiguous and aligned float32 arrays, and {name} is not one"
    return None


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _why_not_native),
    Implementation("reference", _reference, lambda call: None),
)


def _check(call: _Step, out_dtype: Any) -> None:
    for name, array in call.images.items():
        if array.shape != call.sample.shape:
            raise ValueError(f"{name} has shape {array.shape}, but sample has {call.sample.shape}")
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{name} must be a floating-point array; got {array.dtype}")
    if not call.out.flags.writeable:
        raise ValueError("out can only be read: it is a read-only array or memory map")
    if out_dtype is not None and call.out.dtype != out_dtype:
        raise ValueError(f"out_dtype is {np.dtype(out_dtype)}, but out is {call.out.dtype}")
    if len(call.coefficients) != 7:
        raise ValueError(f"coefficients has {len(call.coefficients)} values instead of 7")
    check_settings(call.clip, call.noise, call.unconditional, call.guidance, call.seeds)
    if call.seeds is not None and (call.seeds.dtype != np.int64 or call.seeds.shape != call.sample.shape[:1]):
        raise ValueError(
            f"seeds must be int64, one an image of a sample of shape {call.sample.shape}; "
            f"got {call.seeds.dtype} of shape {call.seeds.shape}"
        )


def check_settings(clip: float | None, noise: Any, unconditional: Any, guidance: float | None, seeds: Any) -> None:
    """Checks the arguments of a step that are no images, for tensors and arrays.

    Raises:
        ValueError: two arguments do not belong together, or a number is out of range; the message names the argument.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive, or None; got {clip}")
    if (unconditional is None) != (guidance is None):
        raise ValueError("guidance and the unconditional output belong together; give both or neither")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number; got {guidance}")
    if seeds is not None and noise is not None:
        raise ValueError("seeds make the noise; give them or noise, not both")
