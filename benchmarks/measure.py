"""What the benchmarks share: how a call is timed, alone or in turns with others, and the machine's own rates,
measured in the same run.

On a GPU, what is timed is a CUDA graph of CALLS calls, as the sampler replays them: launches from Python cost more than small
kernels.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["CALLS", "CPU_LIMITS", "DEVICE", "copy_rate", "full", "machine", "matmul_rate", "repeated", "run", "run_in_turns"]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = 20 if DEVICE == "cuda" else 1

# What holds ours, oneDNN's (OpenVINO has it too) and PyTorch's own operators to a lesser instruction set.
CPU_LIMITS = ("DDIM_FAST_CPU", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
CPU_FLAGS = {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16"}

# What run_in_turns takes: about so many seconds (with --full, half of it without), and so many turns at least and at most.
SECONDS, FEWEST, MOST = 20, 2, 50

PACKAGES = ("ddim_fast", "torch", "triton", "diffusers", "onnxruntime", "openvino")


def full(*values: Any) -> list[Any]:
    """Parameters that are for --full alone; see conftest.py."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


def run(benchmark: Any, call: Callable[[], Any], dtype: torch.dtype, *, moved: int, operations: int = 0) -> None:
    """Times ``call`` with pytest-benchmark and notes the time of one call, what it achieves, and its share of the machine's
    rates.

    Args:
        call: must be correct: check that first.
        moved: bytes, each input counted once and each output once.
        operations: floating-point operations of the matrix products in it.
    """
    benchmark(repeated(call))
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median / CALLS
    benchmark.extra_info |= {
        "microseconds": seconds * 1e6,
        "GB/s": moved / seconds / 1e9,
        "share of copy": moved / seconds / copy_rate(),
    }
    if operations:
        rate = operations / seconds
        benchmark.extra_info |= {"TFLOP/s": rate / 1e12, "share of matmul": rate / matmul_rate(dtype)}


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call``, CALLS times, from the first kernel's start to the last one's end."""
    if DEVICE == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def run_in_turns(benchmark: Any, calls: dict[str, Callable[[], Any]], evaluations: int) -> dict[str, float]:
    """Times implementations of the same thing one after the other, again and again, so that whatever slows the machine down
    slows all of them: their ratios mean more than their times. What pytest-benchmark itself shows are turns.

    Args:
        calls: by name; each must be correct, warmed up, and finished when it returns.
        evaluations: what a call does: evaluations of the network on one image.

    Returns:
        Evaluations a second by name, the medians of the turns, as noted in ``extra_info``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def turn() -> None:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)

    turn()  # the first one is not like the others
    turns = int(SECONDS / sum(seconds[name].pop() for name in calls))
    benchmark.pedantic(turn, rounds=min(max(turns, FEWEST), MOST))
    rates = {name: evaluations / statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info["evaluations/s"] = rates
    return rates


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a second by a copy beyond the caches, and of no more: an H100 copies 1 GiB at five sixths of the
    rate of 128 MiB."""
    size = 1 << 28
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source))


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / _median_seconds(lambda: a @ b)


def _median_seconds(call: Callable[[], Any]) -> float:
    call()
    timed = repeated(call)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        timed()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] / CALLS


def machine() -> dict[str, Any]:
    """What a result was measured on and with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    facts = {
        "processor": fields.get("model name", platform.machine()),
        "family/model": f"{fields.get('cpu family', '?')}/{fields.get('model', '?')}",
        "flags": sorted(CPU_FLAGS & set(fields.get("flags", "").split())),
        "limits": {name: os.environ[name] for name in CPU_LIMITS if name in os.environ},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
