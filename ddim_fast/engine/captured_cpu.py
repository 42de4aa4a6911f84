"""The whole sampling loop as one plan of native operators, on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..io.progress import tell, watch
from ..ops.capturing import capturing
from . import handlers  # noqa: F401  (what a recorder knows)
from .captured import cloned, tensors_of
from .compiled import signature
from .eager import Eager
from .plan import Plan
from .recorder import Derived, Recorder

__all__ = ["CapturedOnCpu", "Recording"]


class CapturedOnCpu(Eager):
    """A run recorded once over static buffers, and then executed from C++: Python calls no operator. Each batch's noise, seeds,
    labels and guidance are copied into the buffers. Threads take turns.

    What is called step by step, such as a trajectory, is executed as by :class:`Eager`.

    Attributes:
        recordings: by the loop, the signature of its inputs and its plan; the one used last comes last.
    """

    # Recordings keep their memory. More shapes than this in turn are not a sampling run but a mistake.
    MOST = 8

    runs_whole = True

    def __init__(self) -> None:
        self.recordings: dict[Hashable, Recording] = {}
        self._derived: Derived = {}
        self._turn = threading.Lock()

    def run(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> Tensor:
        with self._turn, torch.inference_mode(False), torch.no_grad():  # buffers outlive the caller's mode
            key = (loop, signature(inputs), plan)
            recording = self.recordings.pop(key, None)
            if recording is None:
                while len(self.recordings) >= self.MOST:
                    del self.recordings[next(iter(self.recordings))]  # the one that was not used for the longest time
                recording = self._record(loop, inputs, plan)
            self.recordings[key] = recording
            for static, new in zip(tensors_of(recording.inputs), tensors_of(inputs), strict=True):
                static.copy_(new)
            for part, told in enumerate([*recording.told, None]):
                recording.plan.run(part)
                if told is not None:
                    tell(*told)
            return recording.plan.result(recording.like)

    def _record(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> Recording:
        static = cloned(inputs)
        marks: list[int] = []
        told: list[tuple[float, int]] = []

        def mark(images: float, evaluations: int) -> None:
            marks.append(len(recorder.calls))
            told.append((images, evaluations))

        with Recorder(list(tensors_of(static)), self._derived) as recorder, capturing(), watch(mark):
            result = loop(self, static, plan)
        return Recording(Plan(recorder.calls, recorder.view(result), marks), static, result, told)


class Recording(NamedTuple):
    """A plan with its inputs, an empty tensor like its result, and what to :func:`tell` after each of its parts."""

    plan: Plan
    inputs: Any
    like: Tensor
    told: list[tuple[float, int]]
