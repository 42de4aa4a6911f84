"""Arrays of any library, through DLPack (the array API standard's way to share memory): nothing is copied."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

__all__ = ["DLPackArray", "imported", "is_foreign", "like"]

_CPU = 1  # kDLCPU of dlpack.h


class DLPackArray(Protocol):
    """An array of torch, of numpy, or of another library that shares its memory. What ``__dlpack__`` takes differs."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


def is_foreign(value: Any) -> bool:
    """Whether ``value`` is an array that is neither numpy's nor torch's."""
    known = value is None or isinstance(value, (int, float, np.ndarray)) or _is_tensor(value)
    return not known and hasattr(value, "__dlpack__")


def imported(arrays: dict[str, Any], written: str) -> dict[str, Any]:
    """All arrays in the same memory as arrays of one library: that of ``arrays["sample"]`` where it is numpy's or torch's;
    otherwise numpy's if it can hold them all, and torch's if not (on a GPU, bfloat16).

    Args:
        arrays: by their names for messages. What is no array, numbers or None, is passed on.
        written: the name of the one that will be written to.

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
            # torch may hold what numpy does not, and otherwise says why; but it writes to what is for reading, too.
            if _is_for_reading(arrays[written]):
                raise
    return _by_torch(arrays)


def like(result: Any, sample: Any) -> Any:
    """``result`` as an array of the library of ``sample``, if that follows the array API standard; else as it is."""
    if not hasattr(sample, "__array_namespace__"):
        return result
    return sample.__array_namespace__().from_dlpack(result)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_for_reading(array: Any) -> bool:
    """Whether an array's library says so. Before DLPack 1.0 it could not, and numpy takes all such arrays to be."""
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
