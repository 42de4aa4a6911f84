"""What inference makes of a weight once: kept beside the weight, and made anew when that has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .dispatch import is_observed

__all__ = ["cached", "converted", "forget"]

Value = TypeVar("Value")

# Of a weight, up to as many elements as this are compared with what they were, evenly spread.
SAMPLES = 64

_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

# Held where something is made, so that threads that want the same wait for one maker. What is found is found without it.
_making = threading.RLock()


def cached(weight: Tensor, key: Any, make: Callable[[], Value]) -> Value:
    """``make()``, or what it returned at an earlier call with the same ``weight`` and ``key`` if the weight has not changed.

    That it changed is seen by its address, by PyTorch's count of in-place operations and, because a write through ``.data`` (as
    an exponential moving average or a merged LoRA makes it) is not counted, on a CPU by a sample of its elements. Not seen: a
    write through ``.data`` that spares all of these, or one on a GPU, where to look would be to wait for it; :func:`forget` is
    for them.

    Args:
        weight: a parameter; it does not stay alive for this.
        key: what else the result depends on, hashable: what it is and its dtype.
        make: must not return the weight or a view of it.
    """
    entry = _known.get(weight, _NOTHING).get(key)
    if entry is None or not entry.holds_for(weight):
        with _making:
            entry = _known.get(weight, _NOTHING).get(key)  # another thread may have made it meanwhile
            if entry is None or not entry.holds_for(weight):
                # What was made of other contents, or of a dtype that the weight no longer has, would never be looked at again.
                kept = _known[weight] = {k: e for k, e in _known.get(weight, _NOTHING).items() if e.holds_for(weight)}
                entry = _Entry.of(weight, make)
                # A new dictionary: threads that look meanwhile never see one change.
                _known[weight] = {**kept, key: entry}
    return entry.value


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype`` and, if it is a convolution's, in channels_last, for inference: made once, but for compiled or
    exported code, which converts at every call."""
    layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format

    def convert() -> Tensor:
        return weight.detach().to(dtype, memory_format=layout, copy=True)

    if weight.dtype == dtype and weight.is_contiguous(memory_format=layout):
        return weight
    if torch.compiler.is_compiling() or is_observed():
        return weight.to(dtype)
    return cached(weight, ("converted", dtype), convert)


def forget(weight: Tensor) -> None:
    """Drops all that was made of ``weight``."""
    _known.pop(weight, None)


_NOTHING: dict[Any, Any] = {}


class _Entry(NamedTuple):
    address: int
    version: int | None
    sample: Tensor | None
    sampled: Tensor | None
    value: Any

    @classmethod
    def of(cls, weight: Tensor, make: Callable[[], Any]) -> _Entry:
        sample = None
        dense = weight.is_contiguous() or (weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last))
        if weight.device.type == "cpu" and dense and weight.numel():
            # In the order of memory. A view: it shows what is written later.
            stride = -(-weight.numel() // SAMPLES)
            sample = weight.detach().as_strided((-(-weight.numel() // stride),), (stride,))
        # The value last: what another thread writes to the weight in the meantime is a change.
        return cls(weight.data_ptr(), _version(weight), sample, None if sample is None else sample.clone(), make())

    def holds_for(self, weight: Tensor) -> bool:
        return (
            weight.data_ptr() == self.address
            and _version(weight) == self.version
            and (self.sample is None or torch.equal(self.sample, self.sampled))
        )


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
