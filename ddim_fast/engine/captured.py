"""The whole sampling loop in one CUDA graph."""

from __future__ import annotations

import threading
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from .compiled import Compiled
from .run import OneStep, Run

__all__ = ["Captured"]


class Captured(Compiled):
    """All steps of a run, compiled, as one CUDA graph: a batch is one launch from the host. What changes from batch to batch,
    noise, seeds, labels and guidance, is copied into the graph's inputs; its coefficients and noise counters are on the device.
    Threads take turns, and on the device their streams do.

    A trajectory, which shows the steps in between, is executed step by step as by :class:`Compiled`.
    """

    # Graphs keep their memory. More shapes than this in turn are not a sampling run but a mistake.
    MOST = 4

    def __init__(self, one_step: OneStep) -> None:
        super().__init__(one_step)
        self._graphs: dict[tuple, _Graph] = {}
        self._turn = threading.Lock()

    def last(self, run: Run) -> Tensor:
        with self._turn:
            return self._replay(run)

    def _replay(self, run: Run) -> Tensor:
        key = (run.signature, run.unguided)
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= self.MOST:
                del self._graphs[next(iter(self._graphs))]  # the one that was not used for the longest time
            graph = self._capture(run)
        self._graphs[key] = graph
        stream = torch.cuda.current_stream(run.x.device)
        stream.wait_event(graph.read)
        for static, new in zip(graph.run.tensors, run.tensors, strict=True):
            if static is not None:
                static.copy_(new)
        graph.graph.replay()
        x = graph.x.clone()
        graph.read.record(stream)
        return x

    def _capture(self, run: Run) -> _Graph:
        static = run.like([None if t is None else t.clone() for t in run.tensors])
        # What is compiled, tuned or allocated at first use, which may be the second step where that uses deep features again,
        # must not be captured; nor may the default stream be in use.
        stream = torch.cuda.Stream(run.x.device)
        stream.wait_stream(torch.cuda.current_stream(run.x.device))
        with torch.cuda.stream(stream):
            for _ in islice(self.trajectory(static), 2):
                pass
        torch.cuda.current_stream(run.x.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile is none of the graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            x = super().last(static)
        return _Graph(graph, static, x, torch.cuda.Event())


class _Graph(NamedTuple):
    """A graph with its inputs, its output, and the event of the output having been read."""

    graph: torch.cuda.CUDAGraph
    run: Run
    x: Tensor
    read: torch.cuda.Event
