"""What the captured engine does around a CUDA graph, with a graph that a CPU can replay."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ddim_fast.engine.captured import Captured

_recording = []


class _Graph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@contextlib.contextmanager
def _record(graph, **options):
    _recording.append(graph)
    yield
    _recording.pop()


@pytest.fixture
def engine(monkeypatch) -> Captured:
    stream = SimpleNamespace(wait_stream=lambda other: None, wait_event=lambda event: None)
    event = SimpleNamespace(record=lambda stream: None)
    fakes = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": _record,
        "Event": lambda: event,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Captured()


def loop(engine, inputs, plan):
    x, (shift, nothing) = inputs
    assert nothing is None
    result = plan * x + shift
    if _recording:
        _recording[-1].work = lambda: result.copy_(plan * x + shift)
    return result


def test_other_inputs_of_the_same_shapes_are_replayed(engine):
    first = engine.run(loop, (torch.ones(3), (torch.ones(()), None)), 2)
    x, shift = torch.arange(3.0), torch.tensor(5.0)
    second = engine.run(loop, (x, (shift, None)), 2)
    assert torch.equal(first, torch.full((3,), 3.0))  # a replay does not change earlier results
    assert torch.equal(second, 2 * x + shift)
    (graph,) = engine._graphs.values()
    assert graph.graph.replays == 2
    assert torch.equal(x, torch.arange(3.0)) and graph.inputs[0].data_ptr() != x.data_ptr()


def test_other_shapes_and_plans_are_captured_anew_and_the_oldest_are_dropped(engine):
    for plan in (1, 2):
        for size in (2, 3, 4):
            x = torch.randn(size)
            assert torch.equal(engine.run(loop, (x, (x.new_zeros(()), None)), plan), plan * x)
    assert len(engine._graphs) == Captured.MOST
    assert {key[2] for key in engine._graphs} == {1, 2}
