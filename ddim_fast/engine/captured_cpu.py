"""The whole sampling loop as one plan of native operators, on a CPU."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..io.progress import tell, watch
from ..ops.capturing import capturing
from .captured import cloned, tensors_of
from .compiled import signature
from .eager import Eager
from .plan import Plan
from .recorder import Recorder

__all__ = ["CapturedOnCpu"]


class CapturedOnCpu(Eager):
    """A run recorded while it is executed for the first time, and then replayed from C++: Python calls no operator. Each batch's
    noise, seeds, labels and guidance are copied into the recording's buffers. Threads take turns.

    What is called step by step, such as a trajectory, is executed as by :class:`Eager`.
    """

    needs_one_batch_size = True

    # Recordings keep their memory. More shapes than this in turn are not a sampling run but a mistake.
    MOST = 4

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording] = {}
        self._packed: dict[Any, Tensor] = {}
        self._turn = threading.Lock()

    def run(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> Tensor:
        with self._turn:
            key = (loop, signature(inputs), plan)
            recording = self._recordings.pop(key, None)
            if recording is None:
                while len(self._recordings) >= self.MOST:
                    del self._recordings[next(iter(self._recordings))]  # the one that was not used for the longest time
                self._recordings[key], result = self._record(loop, inputs, plan)
                return result
            self._recordings[key] = recording
            for static, new in zip(tensors_of(recording.inputs), tensors_of(inputs), strict=True):
                static.copy_(new)
            for part, told in enumerate([*recording.told, None]):
                recording.plan.run(part)
                if told is not None:
                    tell(*told)
            return recording.plan.result(recording.like)

    def _record(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> tuple[_Recording, Tensor]:
        static = cloned(inputs)
        told: list[tuple[float, int]] = []
        marks: list[int] = []

        def mark(images: float, evaluations: int) -> None:
            told.append((images, evaluations))
            marks.append(len(recorder.calls))
            context.run(tell, images, evaluations)

        context = contextvars.copy_context()  # with whoever watches
        with Recorder(list(tensors_of(static)), self._packed) as recorder, capturing(), watch(mark):
            result = loop(self, static, plan)
        return _Recording(Plan(recorder.calls, recorder.view(result), marks), static, torch.empty_like(result), told), result.clone()


class _Recording(NamedTuple):
    """A plan with its inputs, an empty tensor like its result, and what to :func:`tell` after each of its parts."""

    plan: Plan
    inputs: Any
    like: Tensor
    told: list[tuple[float, int]]
