"""What PyTorch is asked to compute in a run on a CPU, as calls of native operators (csrc/plan.h)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import conv3x3, ddim_step, group_norm_silu, native  # noqa: F401  (what torch.ops.ddim_fast has)
from ..ops.torch_private import StorageWeakRef, is_view, storage_id
from .compiled import signature
from .plan import Buffer, Call, NotRecorded, View

__all__ = ["Derived", "Recorder"]

aten = torch.ops.aten

# Of csrc/elementwise.h.
FILL, COPY, ADD, MULTIPLY, DIVIDE, CLAMP, LERP, ADDCMUL = range(8)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_LAST = torch.channels_last

_REFUSED = " cannot be part of a captured run on a CPU; choose the eager or the compiled engine"

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
        self._meta: dict[Any, Any] = {}  # results without values, by operator and arguments
        self._padded: dict[Buffer, tuple[Tensor, Sequence[int]]] = {}
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
            result = func(*args, **kwargs)
            for t in _tensors(result):
                self._new_buffer(t, "weight")
        elif handler is None:
            raise NotRecorded(f"{func}{_REFUSED}")
        else:
            result = args[0] if func._schema.is_mutable else self._without_values(func, args, kwargs)
            handler(self, result, *args, **kwargs)
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
            integers += [_code(operand), *own]
        self.emit("elementwise", tensors, out, integers, [number, most])

    def derived(self, kind: Any, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, once for each weight and kind."""
        key = kind, storage_id(weight), weight.storage_offset(), tuple(weight.shape), weight.stride()
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
        integers = [_code(x), *x.shape, *out.shape[1:], *weight.shape[1:3], *stride, *padding]
        self.emit("product", [x, packed, self.floats(bias), residual], out, integers)

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise NotRecorded(what + _REFUSED)

    def padded(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """The image that ``x`` is made of, and the numbers of rows and columns of zeros before it."""
        return self._padded.get(self.buffer(x), (x, (0, 0)))

    def note_padding(self, out: Tensor, x: Tensor, before: Sequence[int]) -> None:
        self._padded[self.buffer(out)] = x, before

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


@handles(aten.copy_.default)
def _(recorder: Recorder, out: Tensor, destination: Tensor, source: Tensor, non_blocking: bool = False) -> None:
    recorder.elementwise(COPY, out, source)


@handles(aten._to_copy.default, aten.clone.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, **options: Any) -> None:
    recorder.elementwise(COPY, out, x)


@handles(aten.zeros_like.default, aten.new_zeros.default, aten.zero_.default)
def _(recorder: Recorder, out: Tensor, *arguments: Any, **options: Any) -> None:
    recorder.elementwise(FILL, out, number=0.0)


@handles(aten.add.Tensor, aten.add_.Tensor)
def _(recorder: Recorder, out: Tensor, a: Any, b: Any, alpha: float = 1.0) -> None:
    recorder.elementwise(ADD, out, a, b, number=alpha)


@handles(aten.sub.Tensor, aten.sub_.Tensor)
def _(recorder: Recorder, out: Tensor, a: Any, b: Any, alpha: float = 1.0) -> None:
    recorder.elementwise(ADD, out, a, b, number=-alpha)


@handles(aten.rsub.Scalar, aten.rsub.Tensor)
def _(recorder: Recorder, out: Tensor, x: Tensor, other: Any, alpha: float = 1.0) -> None:
    recorder.elementwise(ADD, out, other, x, number=-alpha)


@handles(aten.mul.Tensor, aten.mul_.Tensor)
def _(recorder: Recorder, out: Tensor, a: Any, b: Any) -> None:
    recorder.elementwise(MULTIPLY, out, a, b)


@handles(aten.div.Tensor, aten.div_.Tensor)
def _(recorder: Recorder, out: Tensor, a: Any, b: Any) -> None:
    recorder.elementwise(DIVIDE, out, a, b)


@handles(aten.clamp.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, least: float | None = None, most: float | None = None) -> None:
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    recorder.elementwise(CLAMP, out, x, number=least, most=most)


@handles(aten.lerp.Tensor, aten.lerp.Scalar)
def _(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor, weight: Any) -> None:
    recorder.elementwise(LERP, out, a, b, weight)


@handles(aten.addcmul.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, a: Tensor, b: Tensor, *, value: float = 1.0) -> None:
    recorder.elementwise(ADDCMUL, out, x, a, b, number=value)


@handles(aten.cat.default)
def _(recorder: Recorder, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> None:
    first = 0
    for t in tensors:
        recorder.elementwise(COPY, out.narrow(dim, first, t.shape[dim]), t)
        first += t.shape[dim]


@handles(aten.index_select.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    recorder.require(dim == 0 and x[:1].is_contiguous() and index.is_contiguous(), "index_select of columns")
    size = x.element_size()
    recorder.emit("gather", [x, index], out, [len(x), x.stride(0) * size, x[:1].numel() * size, index.numel()])


@handles(aten.constant_pad_nd.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0.0) -> None:
    recorder.require(x.ndim == 4 and len(pad) <= 4 and min(pad) >= 0, "padding of another number of dimensions than two")
    left, _, top, _ = [*pad, 0, 0][:4]
    recorder.elementwise(FILL, out, number=value)
    recorder.elementwise(COPY, out[:, :, top : top + x.shape[2], left : left + x.shape[3]], x)
    if value == 0:
        recorder.note_padding(out, x, (top, left))


@handles(aten.mm.default)
def _(recorder: Recorder, out: Tensor, a: Tensor, b: Tensor) -> None:
    recorder.product(_rows(out), _rows(a), b.t()[:, None, None], None, None)


@handles(aten.addmm.default, aten.addmm_.default)
def _(recorder: Recorder, out: Tensor, added: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> None:
    recorder.require(beta == alpha == 1, "a scaled product")
    is_bias = added.ndim == 1
    recorder.product(_rows(out), _rows(a), b.t()[:, None, None], added if is_bias else None, None if is_bias else _rows(added))


@handles(aten.convolution.default)
def _(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> None:
    recorder.require(x.ndim == 4 and not transposed and groups == 1 and set(dilation) == {1}, "this kind of convolution")
    x, before = recorder.padded(x)
    before = [n + own for n, own in zip(before, padding, strict=True)]
    recorder.product(
        out.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1), bias, None, stride=stride, padding=before
    )


@handles(aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default)
def _(recorder: Recorder, out: Tensor, x: Tensor, *options: Any) -> None:
    rows, columns = out.shape[2] // x.shape[2], out.shape[3] // x.shape[3]
    for i in range(rows):
        for j in range(columns):
            recorder.elementwise(COPY, out[:, :, i::rows, j::columns], x)


@handles(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _(
    recorder: Recorder,
    result: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    out, (n, heads, queries, dim) = result[0], q.shape
    recorder.require(dropout == 0 and not is_causal and attn_mask is None, "attention with a mask")
    recorder.require(all(t.stride(3) == 1 for t in (q, k, v, out)), "attention of tokens that are not laid out by rows")
    strides = [stride for t in (q, k, v, out) for stride in t.stride()[:3]]
    integers = [_code(q), n, heads, queries, k.shape[2], dim, *strides]
    recorder.emit("attention", [q, k, v], out, integers, [dim**-0.5 if scale is None else scale])


@handles(torch.ops.ddim_fast.conv3x3.default)
def _(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    prepared: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    upsample: bool,
) -> None:
    images = (x,) if residual is None else (x, residual)
    recorder.require(all(t.is_contiguous(memory_format=_LAST) for t in images), "a convolution of another layout")
    n, channels, height, width = x.shape
    weights, *scales = prepared
    tile = 4 if len(weights) == 36 else 2
    integers = [_code(x), bool(scales), n, height, width, channels, out.shape[1], upsample, tile]
    recorder.emit("conv3x3", [x, weights, recorder.floats(bias), residual, *scales], out, integers)


@handles(torch.ops.ddim_fast.group_norm_silu.default)
def _(
    recorder: Recorder,
    out: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    pre_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
) -> None:
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=_LAST)
    layout = _LAST if channels_last else torch.contiguous_format
    images = [t for t in (x, skip, residual, out) if t is not None]
    recorder.require(all(t.is_contiguous(memory_format=layout) for t in images), "a norm of images of several layouts")
    if pre_shift is not None:
        recorder.require(pre_shift.dtype == torch.float32 and pre_shift.stride(1) == 1, "a shift that is not in float32")
    n, channels, height, width = x.shape
    stride = 0 if pre_shift is None else pre_shift.stride(0)
    integers = [_code(x), n, channels, out.shape[1] - channels, height * width, num_groups, stride, silu, channels_last]
    numbers = [recorder.floats(t) for t in (weight, bias)]
    reads = [x, skip, residual, *numbers, pre_shift, recorder.floats(scale), recorder.floats(shift)]
    recorder.emit("group_norm_silu", reads, out, integers, [eps])


@handles(torch.ops.ddim_fast.ddim_step.default)
def _(
    recorder: Recorder,
    out: Tensor,
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
) -> None:
    images = [t for t in (sample, model_output, noise, out) if t is not None]
    if table is None or unconditional is not None:
        raise NotRecorded("a step without a table of coefficients" + _REFUSED)
    recorder.require(all(t.is_contiguous() for t in images), "a step of images that are not contiguous")
    image = max(1, math.prod(sample.shape[1:]))
    integers = [*map(_code, (sample, model_output, out)), sample.numel(), image, len(table)]
    clips = math.inf if clip is None else clip
    recorder.emit("ddim_step", [sample, model_output, noise, seeds, table, step_index], out, integers, [clips])


def _on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _rows(t: Tensor) -> Tensor:
    """(M, C) -> (M, 1, 1, C)."""
    return t[:, None, None]


def _code(t: Tensor) -> int:
    if t.dtype not in _DTYPES:
        raise NotRecorded(f"{t.dtype}{_REFUSED}")
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
        raise NotRecorded(f"arithmetic on {len(sizes)} dimensions{_REFUSED}")
    missing = 4 - len(sizes)
    return [1] * missing + sizes, [[0] * missing + s for s in strides]
