"""Arrays of any library, shared through DLPack (the array API standard's protocol) without copies."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

__all__ = ["DLPackArray", "imported", "is_foreign", "like"]

_CPU = 1  # kDLCPU of dlpack.h


class DLPackArray(Protocol):
    """An array of torch, numpy, or another library that shares its memory. The arguments of ``__dlpack__`` differ."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


def is_foreign(value: Any) -> bool:
    """Whether ``value`` is an array of a library other than numpy and torch."""
    known = value is None or isinstance(value, (int, float, np.ndarray)) or _is_tensor(value)
    return not known and hasattr(value, "__dlpack__")


def imported(arrays: dict[str, Any], written: str) -> dict[str, Any]:
    """The same memory as arrays of one library: the library of ``arrays["sample"]`` if that is numpy or torch; otherwise numpy,
    or torch if numpy cannot hold all of them (on a GPU, bfloat16).

    Args:
        arrays: arrays by their names in messages. Numbers and None pass unchanged.
        written: the name of the array that will be written to.

    Raises:
        ValueError: an array cannot be shared; the message names it.
    """
    sample = arrays["sample"]
    if isinstance(sample, np.ndarray):
        return _by_numpy(arrays, written)
    if not _is_tensor(sample) and sample.__dlpack_device__()[0] == _CPU:
        try:
            return _by_numpy(arrays, written)
        except ValueError:
            # torch may hold arrays that numpy cannot, and otherwise gives the reason; but it also writes to read-only memory.
            if _is_for_reading(arrays[written]):
                raise
    return _by_torch(arrays)


def like(result: Any, sample: Any) -> Any:
    """``result`` as an array of the library of ``sample`` if that follows the array API standard; otherwise unchanged."""
    if not hasattr(sample, "__array_namespace__"):
        return result
    return sample.__array_namespace__().from_dlpack(result)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_for_reading(array: Any) -> bool:
    """Whether an array is read-only by its library's word. Before DLPack 1.0 there was none, and numpy assumes read-only."""
    if not hasattr(array, "__dlpack__"):
        return False
    try:
        array.__dlpack__(max_version=(1, 0))
        return not np.from_dlpack(array).flags.writeable
    except (BufferError, RuntimeError, TypeError):
        return False


def _by_numpy(arrays: dict[str, Any], written: str) -> dict[str, Any]:
    result = {}
    for name, array in arrays.items():
        result[name] = array if isinstance(array, np.ndarray) else _shared(np.from_dlpack, name, array)
    if isinstance(result[written], np.ndarray) and not result[written].flags.writeable:
        raise ValueError(f"{written} of type {type(arrays[written]).__name__} is shared for reading only")
    return result


def _by_torch(arrays: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.utils.dlpack import from_dlpack

    return {
        name: array if isinstance(array, torch.Tensor) else _shared(from_dlpack, name, array) for name, array in arrays.items()
    }


def _shared(from_dlpack: Any, name: str, array: Any) -> Any:
    if not hasattr(array, "__dlpack__"):
        return array
    try:
        return from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # each library has its own
        raise ValueError(f"cannot share {name} of type {type(array).__name__} through DLPack: {error}") from error
