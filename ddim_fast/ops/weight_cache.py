"""A cache of tensors derived from weights: converted, laid out or transformed once, and again when the weight changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from . import torch_private
from .torch_private import is_observed

__all__ = ["cached", "converted", "forget"]

Value = TypeVar("Value")

# For each weight a dictionary, which is replaced and never changed: threads read it without the lock.
_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# Held while a value is made, so that threads that want the same one wait for one maker.
_lock = threading.RLock()


def cached(weight: Tensor, key: Any, make: Callable[[], Value]) -> Value:
    """``make()``, or the value of an earlier call with the same ``weight`` and ``key`` if the weight has not changed since.

    A weight has changed when its memory is another (``.to(...)``, ``weight.data = ...``) or when PyTorch's version counter has
    moved, as it does with each operation in place, ``copy_`` and ``load_state_dict`` included. PyTorch does not count writes
    through ``.data``, nor any into tensors made under ``torch.inference_mode()``: call :func:`forget` after these.

    Args:
        weight: a parameter; the cache does not keep it alive.
        key: everything else that the value depends on, hashable: the kind of value and its dtype.
        make: must not return the weight or a view of it.
    """
    entry = _entries.get(weight, {}).get(key)
    if entry is None or not entry.is_current(weight):
        with _lock:
            # Values of other contents, or of a dtype that the weight no longer has, would never be asked for again.
            current = {k: e for k, e in _entries.get(weight, {}).items() if e.is_current(weight)}
            entry = current.get(key)  # another thread may have made it meanwhile
            if entry is None:
                memory = StorageWeakRef(weight.untyped_storage())
                # The value last: a write by another thread while it is made is a change.
                entry = _Entry(memory, weight.data_ptr(), torch_private.version(weight), make())
            _entries[weight] = {**current, key: entry}
    return entry.value


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``, a convolution's in channels_last, for inference. The result is cached; compiled and exported
    code converts at every call instead."""
    layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    if weight.dtype == dtype and weight.is_contiguous(memory_format=layout):
        return weight
    if torch.compiler.is_compiling() or is_observed():
        return weight.to(dtype)
    return cached(weight, ("converted", dtype), lambda: weight.detach().to(dtype, memory_format=layout, copy=True))


def forget(weight: Tensor) -> None:
    """Drops all values of ``weight``: needed after writes that :func:`cached` cannot notice. Compiled code has none to drop."""
    if not torch.compiler.is_compiling():
        _entries.pop(weight, None)


class _Entry(NamedTuple):
    """A value, and the state of its weight when it was made. The weak reference keeps no memory of the weight, but sees to it
    that no other storage is taken for this one because it lies at the same address."""

    memory: StorageWeakRef
    address: int
    version: int | None
    value: Any

    def is_current(self, weight: Tensor) -> bool:
        return (
            torch_private.version(weight) == self.version
            and weight.data_ptr() == self.address
            and torch_private.storage_id(weight) == self.memory.cdata
        )
