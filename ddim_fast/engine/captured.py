"""The whole sampling loop in one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..io.progress import collect, tell
from .compiled import Compiled, signature

__all__ = ["Captured", "cloned", "tensors_of"]


class Captured(Compiled):
    """A run recorded once over static buffers, its steps compiled, and then replayed by one launch from the host. Each batch's
    noise, seeds, labels and guidance are copied into the buffers. Threads take turns, and on the device their streams do.

    What is called step by step, such as a trajectory, is executed as by :class:`Compiled`.
    """

    # Graphs keep their memory. More shapes than this in turn are not a sampling run but a mistake.
    MOST = 4

    runs_whole = True

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[Hashable, _Graph] = {}
        self._turn = threading.Lock()

    def run(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> Tensor:
        with self._turn, torch.inference_mode(False), torch.no_grad():  # buffers outlive the caller's mode
            key = (loop, signature(inputs), plan)
            graph = self._graphs.pop(key, None)
            if graph is None:
                while len(self._graphs) >= self.MOST:
                    del self._graphs[next(iter(self._graphs))]  # the one that was not used for the longest time
                graph = self._capture(loop, inputs, plan)
            self._graphs[key] = graph
            stream = torch.cuda.current_stream(graph.result.device)
            stream.wait_event(graph.read)
            for static, new in zip(tensors_of(graph.inputs), tensors_of(inputs), strict=True):
                static.copy_(new)
            graph.graph.replay()
            result = graph.result.clone()
            graph.read.record(stream)
            tell(*graph.told)
            return result

    def _capture(self, loop: Callable[..., Tensor], inputs: Any, plan: Hashable) -> _Graph:
        static = cloned(inputs)
        # What is compiled, tuned or allocated at first use must not be captured; nor may the default stream be in use.
        device = next(tensors_of(inputs)).device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), collect():
            loop(self, static, plan)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is none of the graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), collect() as told:
            result = loop(self, static, plan)
        images, evaluations = (sum(part[i] for part in told) for i in (0, 1))
        return _Graph(graph, static, result, torch.cuda.Event(), (images, int(evaluations)))


class _Graph(NamedTuple):
    """A graph with its inputs, its result, the event of the result having been read, and what to :func:`tell` of a replay."""

    graph: torch.cuda.CUDAGraph
    inputs: Any
    result: Tensor
    read: torch.cuda.Event
    told: tuple[float, int]


def cloned(value: Any) -> Any:
    """Copies of tensors nested in tuples and named tuples."""
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, tuple):
        return value
    copies = map(cloned, value)
    return type(value)(*copies) if hasattr(value, "_fields") else tuple(copies)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Those nested in tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)
