"""The whole sampling loop in one CUDA graph."""

from __future__ import annotations

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

    A trajectory, which shows the steps in between, is executed step by step as by :class:`Compiled`.
    """

    # Graphs keep their memory. More shapes than this in turn are not a sampling run but a mistake.
    MOST = 4

    def __init__(self, one_step: OneStep) -> None:
        super().__init__(one_step)
        self._graphs: dict[tuple, _Graph] = {}

    def last(self, run: Run) -> Tensor:
        key = (run.signature, run.unguided)
        graph = self._graphs.pop(key, None)
        if graph is None:
            while len(self._graphs) >= self.MOST:
                del self._graphs[next(iter(self._graphs))]  # the one that was not used for the longest time
            graph = self._capture(run)
        self._graphs[key] = graph
        for static, new in zip(graph.run.tensors, run.tensors, strict=True):
            if static is not None:
                static.copy_(new)
        graph.graph.replay()
        return graph.x.clone()

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
        with torch.cuda.graph(graph):
            x = super().last(static)
        return _Graph(graph, static, x)


class _Graph(NamedTuple):
    """A graph with its inputs and its output."""

    graph: torch.cuda.CUDAGraph
    run: Run
    x: Tensor
