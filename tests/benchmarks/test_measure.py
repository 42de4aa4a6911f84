import types

import measure
import pytest


@pytest.fixture
def clock(monkeypatch):
    """The time that measure.py reads, in seconds; it stands still by itself."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Benchmark:
    """What is used of pytest-benchmark's fixture, without its table of the stopped clock."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            function()


def test_implementations_take_turns_and_medians_are_noted(clock, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 45)
    called = []
    durations = {"ours": iter([5, 1, 2, 30, 1, 2]), "theirs": iter([4, 4, 4, 4, 4, 90])}

    def call(name):
        called.append(name)
        clock.now += next(durations[name])

    benchmark = Benchmark()
    rates = measure.run_in_turns(benchmark, {name: lambda name=name: call(name) for name in durations}, evaluations=8)
    assert called == ["ours", "theirs"] * 6  # 45 s are five turns as long as the first, which does not count
    assert rates == benchmark.extra_info["evaluations/s"] == {"ours": 4.0, "theirs": 2.0}


def test_slow_implementations_have_their_turns_too(clock):
    def call():
        clock.now += 1000

    assert measure.run_in_turns(Benchmark(), {"slow": call}, evaluations=1) == {"slow": 1e-3}
    assert clock.now == 1000 * (1 + measure.FEWEST)
