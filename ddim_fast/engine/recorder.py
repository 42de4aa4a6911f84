"""What PyTorch is asked to compute in a run on a CPU, as calls of native operators (csrc/plan.h)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import native
from ..ops.torch_private import StorageWeakRef, is_view, storage_id
from .compiled import signature
from .plan import Buffer, Call, NotRecorded, View

__all__ = ["REFUSED", "Derived", "Recorder", "code_of", "handles"]

aten = torch.ops.aten

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LAST = torch.channels_last

REFUSED = " cannot be part of a captured run on a CPU; choose the eager or the compiled engine"

# By kind and weight, with a reference to the weight: while it is held, no other weight has its storage's number.
Derived = dict[Any, tuple[StorageWeakRef, Tensor]]

Handler = Callable[..., None]
HANDLERS: dict[Any, Handler] = {}

# They allocate; what they return has no value yet.
_ALLOCATIONS = (
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


class Recorder(TorchDispatchMode):
    """A context in which each operation of PyTorch is recorded instead of executed.

    Views need no call: a call names memory, by its buffer and strides. What is computed from weights alone is executed, and a
    weight itself.

    Args:
        inputs: tensors that a replay reads anew.
        derived: what was made of weights; shared by recordings, which add to it.

    Attributes:
        calls: what was recorded so far.
    """

    def __init__(self, inputs: Sequence[Tensor], derived: Derived) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._buffers: dict[int, Buffer] = {}
        self._references: list[StorageWeakRef] = []  # while they are held, each storage's number is its own
        self._constants: dict[Any, Any] = {}  # what was computed from weights alone, by operator and arguments
        self._meta: dict[Any, Any] = {}  # results without values, by operator and arguments
        self._padded: dict[Buffer, tuple[int, Tensor, Sequence[int]]] = {}  # with how many calls there were then
        self._derived = derived
        for key in [key for key, (reference, _) in derived.items() if reference.expired()]:
            del derived[key]
        for tensor in inputs:
            self._new_buffer(tensor, "input")

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is None and func not in _ALLOCATIONS:
            with self:  # what it is made of is recorded
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if is_view(func):
            return func(*args, **kwargs)
        if func in _ALLOCATIONS:
            result = func(*args, **kwargs)
            self._new_buffer(result, "scratch")
        elif all(self.buffer(t).kind == "weight" for t in _tensors([args, list(kwargs.values())])):
            result = self._folded(func, args, kwargs)
        elif handler is None:
            raise NotRecorded(f"{func}{REFUSED}")
        else:
            result = args[0] if func._schema.is_mutable else self._without_values(func, args, kwargs)
            handler(self, result, *args, **kwargs)
        return result

    def _folded(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The result of weights alone: computed once, whatever the number of steps that ask for it."""
        key = (
            func,
            signature(tuple(args)),
            signature(tuple(kwargs.items())),
            *map(_place, _tensors([args, list(kwargs.values())])),
        )
        if key in self._constants:
            return self._constants[key]
        result = func(*args, **kwargs)
        for t in _tensors(result):
            self._new_buffer(t, "weight")
        if func._schema.is_mutable:
            self._constants.clear()  # a weight has changed
        else:
            self._constants[key] = result
        return result

    def _without_values(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Results of the shapes and layouts that ``func`` would return. What is in them the plan will compute."""

        def allocate(t: Tensor) -> Tensor:
            # An image of one channel has two layouts; a product writes this one.
            strides = t.to(memory_format=_LAST).stride() if func is aten.convolution.default else t.stride()
            made = torch.empty_strided(t.shape, strides, dtype=t.dtype)
            self._new_buffer(made, "scratch")
            return made

        key = func, signature(tuple(args)), signature(tuple(kwargs.items()))
        if key not in self._meta:  # the steps of a run are alike
            options = {name: _mapped(value, _on_meta) for name, value in kwargs.items()}
            if "device" in options:
                options["device"] = "meta"
            self._meta[key] = func(*_mapped(tuple(args), _on_meta), **options)
        return _mapped(self._meta[key], allocate)

    def buffer(self, tensor: Tensor) -> Buffer:
        """The memory of a tensor; one that was there before is a weight."""
        buffer = self._buffers.get(storage_id(tensor))
        return self._new_buffer(tensor, "weight") if buffer is None else buffer

    def view(self, tensor: Tensor) -> View:
        """Where a tensor begins."""
        return View(self.buffer(tensor), int(tensor.storage_offset()) * tensor.element_size())

    def emit(
        self, name: str, reads: Sequence[Tensor | None], out: Tensor, integers: Sequence[int], reals: Sequence[float] = ()
    ) -> None:
        """Records a call. ``reads`` are its buffers in their order; that of ``out`` stands where plan.cpp reads it."""
        views = [None if t is None else self.view(t) for t in reads]
        self.calls.append(Call(name, views, self.view(out), list(map(int, integers)), list(map(float, reals))))

    def elementwise(self, arithmetic: int, out: Tensor, *inputs: Any, number: float = 1.0, most: float = 0.0) -> None:
        """Records arithmetic on elements; inputs are tensors that broadcast against ``out``, or numbers."""
        tensors = [t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float32) for t in inputs]
        operands = [*(t.expand(out.shape) for t in tensors), out]
        sizes, strides = _coalesced(operands)
        integers = [arithmetic, *sizes]
        for operand, own in zip(operands, strides, strict=True):
            integers += [code_of(operand), *own]
        self.emit("elementwise", tensors, out, integers, [number, most])

    def derived(self, kind: Any, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, once for each weight and kind."""
        key = kind, _place(weight), signature(weight)
        if key not in self._derived:
            self._derived[key] = StorageWeakRef(weight.untyped_storage()), make()
        return self._derived[key][1]

    def floats(self, tensor: Tensor | None) -> Tensor | None:
        """A weight in float32, one number after the other."""
        if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
            return tensor
        self.require(self.buffer(tensor).kind == "weight", f"numbers in {tensor.dtype} that are computed in the run")
        return self.derived("floats", tensor, lambda: tensor.float().contiguous())

    def packed(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, height, width, C) weights, or (K, C), as a product reads them."""
        self.require(self.buffer(weight).kind == "weight", "a product of two tensors that are computed in the run")
        self.require(dtype == torch.float32 or native.module.conv3x3_has_bf16(), "bfloat16 without instructions for it")

        def pack() -> Tensor:
            rows = weight.float().flatten(1).contiguous()
            made = torch.empty(native.module.prepared_product_numbers(*rows.shape), dtype=dtype)
            native.module.prepare_product(rows.data_ptr(), made.data_ptr(), *rows.shape, dtype == torch.bfloat16)
            return made

        packed = self.derived(dtype, weight, pack)
        self.buffer(packed).origin = weight
        return packed

    def product(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        *,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
    ) -> None:
        """Records a convolution; ``x`` and ``out`` are (N, H, W, C), ``weight`` is (K, height, width, C)."""
        for t in (x, out, *(() if residual is None else (residual,))):
            self.require(t.is_contiguous(), "a product of tensors that are not laid out by rows")
        packed = self.packed(weight, x.dtype)
        integers = [code_of(x), *x.shape, *out.shape[1:], *weight.shape[1:3], *stride, *padding]
        self.emit("product", [x, packed, self.floats(bias), residual], out, integers)

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise NotRecorded(what + REFUSED)

    def padded(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The image that ``x`` is made of, if it is still the same, and the numbers of rows and columns of zeros before it."""
        number, image, before = self._padded.get(self.buffer(x), (0, x, (0, 0)))
        written = {self.buffer(image), self.buffer(x)}
        is_same = image is x or not any(call.out.buffer in written for call in self.calls[number:])
        return (image, before) if is_same else (x, (0, 0))

    def note_padding(self, out: Tensor, x: Tensor, before: Sequence[int]) -> None:
        """Remember what :meth:`padded` returns."""
        self._padded[self.buffer(out)] = len(self.calls), x, before

    def _new_buffer(self, tensor: Tensor, kind: str) -> Buffer:
        storage = tensor.untyped_storage()
        buffer = Buffer(kind, storage.nbytes(), None if kind == "scratch" else tensor)
        self._references.append(StorageWeakRef(storage))
        self._buffers[storage_id(tensor)] = buffer
        return buffer


def handles(*operators: Any) -> Callable[[Handler], Handler]:
    """Registers a function (recorder, result, *arguments) as what records these operators."""

    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(operators, function))
        return function

    return register


def _place(t: Tensor) -> tuple[int, int]:
    """Where a tensor begins: with its signature, what tells it from others while its storage lives."""
    return storage_id(t), int(t.storage_offset())


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def code_of(t: Tensor) -> int:
    if t.dtype not in _DTYPES:
        raise NotRecorded(f"{t.dtype}{REFUSED}")
    return _DTYPES[t.dtype]


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``function`` of each tensor in lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(part, function) for part in value) if isinstance(value, (tuple, list)) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _coalesced(operands: Sequence[Tensor]) -> tuple[list[int], list[list[int]]]:
    """Four sizes, and four strides of each tensor of one shape: dimensions in the order of the last one's memory, and those
    that lie beside each other in all of them as one."""
    shape, out = operands[0].shape, operands[-1]
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=out.stride().__getitem__, reverse=True)
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in order:
        own = [t.stride(d) for t in operands]
        if sizes and all(s[-1] == stride * shape[d] for s, stride in zip(strides, own, strict=True)):
            sizes[-1] *= shape[d]
            for s, stride in zip(strides, own, strict=True):
                s[-1] = stride
            continue
        sizes.append(shape[d])
        for s, stride in zip(strides, own, strict=True):
            s.append(stride)
    if len(sizes) > 4:
        raise NotRecorded(f"arithmetic on {len(sizes)} dimensions{REFUSED}")
    missing = 4 - len(sizes)
    return [1] * missing + sizes, [[0] * missing + s for s in strides]
