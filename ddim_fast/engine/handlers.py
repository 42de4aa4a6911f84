"""How a :class:`ddim_fast.engine.recorder.Recorder` records each operation of PyTorch and each operator of this package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import conv3x3, ddim_step, group_norm_silu  # noqa: F401  (they register what torch.ops.ddim_fast has)
from .plan import ADD, ADDCMUL, CLAMP, COPY, DIVIDE, FILL, LERP, MULTIPLY, NotRecorded
from .recorder import REFUSED, Recorder, code_of, handles

__all__: list[str] = []

aten = torch.ops.aten

_LAST = torch.channels_last


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
    integers = [code_of(q), n, heads, queries, k.shape[2], dim, *strides]
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
    integers = [code_of(x), bool(scales), n, height, width, channels, out.shape[1], upsample, tile]
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
    integers = [code_of(x), n, channels, out.shape[1] - channels, height * width, num_groups, stride, silu, channels_last]
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
        raise NotRecorded("a step without a table of coefficients" + REFUSED)
    recorder.require(all(t.is_contiguous() for t in images), "a step of images that are not contiguous")
    image = max(1, math.prod(sample.shape[1:]))
    integers = [*map(code_of, (sample, model_output, out)), sample.numel(), image, len(table)]
    clips = math.inf if clip is None else clip
    recorder.emit("ddim_step", [sample, model_output, noise, seeds, table, step_index], out, integers, [clips])


def _rows(t: Tensor) -> Tensor:
    """(M, C) -> (M, 1, 1, C)."""
    return t[:, None, None]
