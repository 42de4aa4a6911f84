"""A recorded run as a plan of native operators: what is not needed left out, memory shared, executed by one call."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from ..ops import native
from ..ops.torch_private import is_profiled

__all__ = [
    "ADD",
    "ADDCMUL",
    "CLAMP",
    "COPY",
    "DIVIDE",
    "FILL",
    "LERP",
    "MULTIPLY",
    "Buffer",
    "Call",
    "NotRecorded",
    "Plan",
    "View",
]

# The first integer of a call of elementwise, see csrc/elementwise.h.
FILL, COPY, ADD, MULTIPLY, DIVIDE, CLAMP, LERP, ADDCMUL = range(8)

# Buffers begin at cache lines.
_LINE = 64

# Where a call's own buffer stands among those that plan.cpp reads; elsewhere it is the last one.
_PLACE_OF_OUT = {"conv3x3": 4, "group_norm_silu": 3}


class NotRecorded(ValueError):
    """Part of a run that a plan has no operator for."""


@dataclasses.dataclass(eq=False)
class Buffer:
    """Memory that calls name.

    Attributes:
        kind: ``input``, ``weight`` or ``scratch``: which lives from a call to another.
        bytes: its size.
        tensor: its memory, of inputs and weights.
        origin: the (K, height, width, C) weights that a product's were packed from.
        segment, offset: where it lies in the plan.
    """

    kind: str
    bytes: int
    tensor: Tensor | None
    origin: Tensor | None = None
    segment: int = -1
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class View:
    """A place in a buffer, in bytes from its beginning."""

    buffer: Buffer
    offset: int


@dataclasses.dataclass
class Call:
    """An operator's call.

    Attributes:
        name: of the operator.
        reads: the buffers that it reads, without ``out``, in their order.
        out: the one that it writes.
        integers, reals: its arguments, in the order of csrc/plan.cpp.
    """

    name: str
    reads: list[View | None]
    out: View
    integers: list[int]
    reals: list[float]

    def views(self) -> list[View | None]:
        """All buffers in the order of csrc/plan.cpp."""
        place = _PLACE_OF_OUT.get(self.name, len(self.reads))
        return [*self.reads[:place], self.out, *self.reads[place:]]


class Plan:
    """A recorded run.

    Args:
        calls: as recorded.
        result: the buffer that the run's result lies in.
        marks: numbers of calls after which :meth:`run` can be asked to stop, rising.

    Raises:
        NotRecorded: the result is an input, or a weight.

    Attributes:
        calls: names, places of buffers, integers and numbers, as csrc/plan.h takes them.
        buffers: what lies in each segment after the first, which is the memory between two calls.
        bytes: the size of the first segment.
        result_offset: where the result lies there.
    """

    def __init__(self, calls: Sequence[Call], result: View, marks: Sequence[int]) -> None:
        if result.buffer.kind != "scratch":
            raise NotRecorded("a captured run on a CPU must compute its result")
        kept = _needed(_fused(calls), result)
        numbers = [number for number, _ in kept]
        self._marks = [bisect.bisect_left(numbers, mark) for mark in marks]
        only = [call for _, call in kept]
        self.bytes = _share_memory(only, result)
        self._memory = torch.empty(self.bytes, dtype=torch.uint8)
        self.buffers: list[Buffer] = []
        for call in only:
            for view in call.views():
                if view is not None and view.buffer.segment < 0:
                    self.buffers.append(view.buffer)
                    view.buffer.segment = len(self.buffers)
        self.calls = [(call.name, [_place(view) for view in call.views()], call.integers, call.reals) for call in only]
        self._plan = native.module.Plan([(self.bytes, True), *((b.bytes, False) for b in self.buffers)], self.calls)
        tensors = [self._memory, *(b.tensor for b in self.buffers if b.tensor is not None)]
        self._addresses = [t.untyped_storage().data_ptr() for t in tensors]
        self.result_offset = result.buffer.offset + result.offset

    def run(self, part: int) -> None:
        """Executes the calls between two marks, or before the first one, or after the last one."""
        begin = self._marks[part - 1] if part else 0
        end = self._marks[part] if part < len(self._marks) else len(self.calls)
        threads = torch.get_num_threads()
        if not is_profiled():
            return self._plan.run(self._addresses, begin, end, threads)
        for number in range(begin, end):
            with record_function(f"ddim_fast::{self.calls[number][0]}[native]"):
                self._plan.run(self._addresses, number, number + 1, threads)

    def result(self, like: Tensor) -> Tensor:
        """A copy of what was computed."""
        memory = self._memory[self.result_offset : self.result_offset + like.numel() * like.element_size()]
        return memory.view(like.dtype).as_strided(like.shape, like.stride()).clone()


def _place(view: View | None) -> tuple[int, int]:
    return (-1, 0) if view is None else (view.buffer.segment, view.buffer.offset + view.offset)


def _fused(calls: Sequence[Call]) -> list[Call]:
    """A product whose result is only added to something, with that as its residual."""
    uses: dict[Buffer, int] = {}
    writers: dict[Buffer, list[int]] = {}
    for number, call in enumerate(calls):
        for view in call.reads:
            if view is not None:
                uses[view.buffer] = uses.get(view.buffer, 0) + 1
        writers.setdefault(call.out.buffer, []).append(number)
    fused = list(calls)
    for number, call in enumerate(calls):
        if call.name != "elementwise" or call.integers[0] != ADD or call.reals[0] != 1.0:
            continue
        for own, other in ((1, 0), (0, 1)):
            view, residual = call.reads[own], call.reads[other]
            if view is None or residual is None or uses[view.buffer] != 1 or len(writers.get(view.buffer, ())) != 1:
                continue
            place = writers[view.buffer][0]
            product = calls[place]
            if product.name != "product" or product.reads[3] is not None or product.out != view or not _is_plain(call, product):
                continue
            # The residual is as it was when the sum is taken, so the product moves there, past calls that leave what it reads.
            read = {v.buffer for v in product.reads if v is not None}
            if any(passed.out.buffer in read for passed in calls[place:number]):
                continue
            fused[number] = dataclasses.replace(product, reads=[*product.reads[:3], residual], out=call.out)
            break
    return fused


def _is_plain(addition: Call, product: Call) -> bool:
    """Whether an addition takes the product's numbers one after the other, in one dtype."""
    sizes, operands = addition.integers[1:5], [addition.integers[i : i + 5] for i in (5, 10, 15)]
    dtype, images, *_ = product.integers
    count = images * product.integers[5] * product.integers[6] * product.integers[7]
    return sizes == [1, 1, 1, count] and all(operand[0] == dtype and operand[4] == 1 for operand in operands)


def _needed(calls: Sequence[Call], result: View) -> list[tuple[int, Call]]:
    """The calls, with their numbers, on which the result depends."""
    needed, kept = {result.buffer}, []
    for number in reversed(range(len(calls))):
        call = calls[number]
        if call.out.buffer in needed:
            needed.update(view.buffer for view in call.reads if view is not None)
            kept.append((number, call))
    return kept[::-1]


def _share_memory(calls: Sequence[Call], result: View) -> int:
    """Places the buffers that live between two calls in one segment, number 0; those that do not live at the same time share
    memory.

    Returns:
        Its size in bytes.
    """
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for number, call in enumerate(calls):
        for view in call.views():
            if view is not None and view.buffer.kind == "scratch":
                first.setdefault(view.buffer, number)
                last[view.buffer] = number
    last[result.buffer] = len(calls)
    ends: dict[int, list[Buffer]] = {}
    for buffer, number in last.items():
        ends.setdefault(number, []).append(buffer)
    free: list[tuple[int, int]] = []  # gaps, as (offset, bytes), in their order
    size = 0
    starts: dict[int, list[Buffer]] = {}
    for buffer, number in first.items():
        starts.setdefault(number, []).append(buffer)
    for number in range(len(calls)):
        for buffer in starts.get(number, ()):
            bytes_ = _whole_lines(buffer)
            fitting = [(length, offset) for offset, length in free if length >= bytes_]
            if fitting:
                length, buffer.offset = min(fitting)  # the gap that it fills best
                free.remove((buffer.offset, length))
                if length > bytes_:
                    bisect.insort(free, (buffer.offset + bytes_, length - bytes_))
            else:
                # What is free at the end is where it begins.
                if free and sum(free[-1]) == size:
                    buffer.offset = free.pop()[0]
                else:
                    buffer.offset = size
                size = buffer.offset + bytes_
            buffer.segment = 0
        for buffer in ends.get(number, ()):
            _give_back(free, buffer.offset, _whole_lines(buffer))
    return size


def _whole_lines(buffer: Buffer) -> int:
    return -(-max(buffer.bytes, 1) // _LINE) * _LINE


def _give_back(free: list[tuple[int, int]], offset: int, length: int) -> None:
    """Adds a gap, joined with those beside it."""
    at = bisect.bisect(free, (offset, length))
    if at < len(free) and offset + length == free[at][0]:
        length += free.pop(at)[1]
    if at and sum(free[at - 1]) == offset:
        before = free.pop(at - 1)
        offset, length, at = before[0], before[1] + length, at - 1
    free.insert(at, (offset, length))
