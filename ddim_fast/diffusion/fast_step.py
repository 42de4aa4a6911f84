"""One DDIM step for any sampling loop: torch, numpy, and every library with DLPack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..ops.noise import check_seeds
from .dlpack import DLPackArray, imported, is_foreign, like
from .step import check_eta, step_coefficients

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["fast_ddim_step"]

Array = TypeVar("Array", bound=DLPackArray)


def fast_ddim_step(
    sample: Array,
    model_output: DLPackArray,
    alphas_cumprod_t: float | Sequence[float] | DLPackArray,
    alphas_cumprod_prev: float | Sequence[float] | DLPackArray,
    *,
    eta: float | str = 0.0,
    noise: DLPackArray | None = None,
    seeds: DLPackArray | Sequence[int] | None = None,
    step: int = 0,
    prediction_type: str = "epsilon",
    clip_sample_range: float | None = None,
    unconditional_output: DLPackArray | None = None,
    guidance: float | None = None,
    out: Array | None = None,
    out_dtype: torch.dtype | np.dtype | None = None,
) -> Array:
    """One step of the DDIM sampler (Song et al. 2021, eq. 12), for any sampling loop, in one pass over memory.

    Works on torch tensors, on numpy arrays without torch being installed, and on the arrays of any library that shares them
    through DLPack (``__dlpack__`` and ``__dlpack_device__``: JAX, CuPy, ...), which are not copied. numpy computes on these, or
    torch if numpy cannot hold them: on a GPU, or in bfloat16.

    Args:
        sample: x_t, of any shape; float32, float64, bfloat16 or float16. Arithmetic is in float32 (float64 for float64).
        model_output: the network's prediction at x_t, of the sample's shape and any of these dtypes.
        alphas_cumprod_t: the share of signal variance in ``sample``: alphas_cumprod[t]. A float, a 0-dim tensor, or an (N,)
            tensor or list with one value per image. A tensor on the GPU is used there, without waiting for it.
        alphas_cumprod_prev: the same for the timestep that comes next in the run; 1.0 after the last one.
        eta: 0 deterministic, 1 the variance of DDPM, anything between, or ``"sigma-hat"`` for the paper's larger variance.
        noise: standard normal noise like ``sample``. If ``eta`` is not 0, this or ``seeds`` is needed; otherwise neither is
            read.
        seeds: N whole numbers in [0, 2^63), one per image, from which the step makes its noise: that of
            :func:`ddim_fast.seeded_noise`, which depends on seed, ``step`` and element alone.
        step: the number of this step in the run; with ``seeds``, each step needs its own.
        prediction_type: the type of ``model_output``: ``epsilon``, ``v_prediction`` or ``sample``.
        clip_sample_range: clip the predicted x_0 to [-r, r] (epsilon stays as predicted); None does not clip.
        unconditional_output: the prediction without the condition, for classifier-free guidance (Ho and Salimans 2022):
            the step is taken with unconditional + guidance (model_output - unconditional).
        guidance: the guidance scale.
        out: the array for the result, of the sample's shape; may be one of the inputs. By default a new one.
        out_dtype: the dtype of that new array; the sample's by default. A numpy dtype if numpy computes, otherwise one of
            torch.

    Returns:
        x_prev: ``out`` if it is given, otherwise an array of the sample's library. A library known only through DLPack must
            follow the array API standard for that (``__array_namespace__``, with ``from_dlpack``). For other libraries it is
            the numpy or torch array of the computation, which they can import.

    Raises:
        ValueError: shapes, dtypes or devices differ, a value is out of range, noise is missing, or an array cannot be shared.
            Or the prediction does not determine the image or epsilon at this noise level (on a GPU that gives NaN).
    """
    arrays = {
        "sample": sample,
        "model_output": model_output,
        "alphas_cumprod_t": alphas_cumprod_t,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        "noise": noise,
        "seeds": seeds,
        "unconditional_output": unconditional_output,
        "out": out,
    }
    if any(is_foreign(array) for array in arrays.values()):
        result = fast_ddim_step(
            **imported(arrays, "out"),
            eta=eta,
            step=step,
            prediction_type=prediction_type,
            clip_sample_range=clip_sample_range,
            guidance=guidance,
            out_dtype=out_dtype,
        )
        return like(result, sample) if out is None else out
    eta = check_eta(eta)
    stochastic = eta != 0
    if stochastic and noise is None and seeds is None:
        raise ValueError(f"eta = {eta} needs noise or seeds")
    if clip_sample_range is not None and not clip_sample_range > 0:
        raise ValueError(f"clip_sample_range must be positive, or None; got {clip_sample_range}")
    ddim_step: Any
    as_level: Any
    as_seeds: Any
    if isinstance(sample, np.ndarray):
        from ..ops.ddim_step_numpy import ddim_step_numpy as ddim_step

        as_level, as_seeds = _numpy_level, _numpy_seeds
    else:
        from ..ops.ddim_step import ddim_step

        as_level, as_seeds = _level, _seeds
    a, b = (as_level(value, sample) for value in (alphas_cumprod_t, alphas_cumprod_prev))
    _check_each(a, b, eta, prediction_type)
    return ddim_step(
        sample,
        model_output,
        step_coefficients(a, b, eta, prediction_type),
        clip_sample_range,
        noise if stochastic else None,
        out,
        unconditional=unconditional_output,
        guidance=guidance,
        seeds=as_seeds(seeds, sample) if stochastic and seeds is not None else None,
        step=step,
        out_dtype=out_dtype,
    )


def _level(value: float | Tensor, sample: Tensor) -> float | Tensor:
    """A noise level as a float if that needs no wait, otherwise as a float64 tensor on the device of ``sample``."""
    import torch

    if isinstance(value, (np.ndarray, list, tuple)):
        value = torch.as_tensor(_checked_levels(value))
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.ndim == 0:
        return float(value) if value.device.type == "cpu" and not torch.compiler.is_compiling() else value.double()
    _check_level_shape(value.shape, sample.shape)
    return value.to(sample.device, torch.float64).view(-1, *[1] * (sample.ndim - 1))


def _numpy_level(value: float | np.ndarray, sample: np.ndarray) -> float | np.ndarray:
    """A noise level as a float, or as a float64 array that broadcasts against ``sample``."""
    if np.ndim(value) == 0:
        return float(value)
    level = _checked_levels(value)
    _check_level_shape(level.shape, sample.shape)
    return level.reshape(-1, *[1] * (sample.ndim - 1))


def _check_each(a: Any, b: Any, eta: float | str, prediction_type: str) -> None:
    """Raise the errors of :func:`step_coefficients` for each of several levels, if reading them needs no wait."""
    if isinstance(a, float) and isinstance(b, float):
        return
    levels = [_on_host(level) for level in (a, b)]
    if all(level is not None for level in levels):
        for start, end in set(zip(*(level.ravel().tolist() for level in np.broadcast_arrays(*levels)), strict=True)):
            step_coefficients(start, end, eta, prediction_type)


def _on_host(level: Any) -> Any:
    """The values of noise levels, or None: on another device, or while code is compiled or traced."""
    if isinstance(level, (float, np.ndarray)):
        return level
    import torch

    from ..ops.torch_private import is_observed

    if level.device.type != "cpu" or is_observed() or torch.compiler.is_compiling():
        return None
    return level.detach().numpy()


def _checked_levels(values: Any) -> np.ndarray:
    """Noise levels in the host's memory, as float64."""
    levels = np.asarray(values, np.float64)
    if not np.all((levels >= 0) & (levels <= 1)):
        raise ValueError(f"noise levels must lie in [0, 1]; got {levels}")
    return levels


def _check_level_shape(shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    if len(shape) != 1 or not sample_shape or shape[0] not in (1, sample_shape[0]):
        raise ValueError(
            f"a noise level is one number or one an image; got shape {tuple(shape)} for a sample of shape {tuple(sample_shape)}"
        )


def _seeds(seeds: Tensor | Sequence[int], sample: Tensor) -> Tensor:
    import torch

    if isinstance(seeds, torch.Tensor):
        return seeds
    return torch.tensor(check_seeds(seeds), dtype=torch.int64, device=sample.device)


def _numpy_seeds(seeds: np.ndarray | Sequence[int], sample: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(seeds if isinstance(seeds, np.ndarray) else np.array(check_seeds(seeds), np.int64))
