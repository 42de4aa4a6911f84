"""The C++ operators beside PyTorch's on the instruction set that this machine has and, where that is more, on AVX2 alone: a
fault that hits machines like others' shows on one's own. Each in a process of its own; see every_cpu.py.

    pytest benchmarks/test_every_cpu.py --benchmark-only -s
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import every_cpu
import pytest
from measure import CPU_LIMITS, DEVICE

from ddim_fast.ops import native

AVX2 = dict(zip(CPU_LIMITS, ("avx2", "AVX2", "avx2"), strict=True))

# PyTorch's time over ours: below these something is wrong, not only slower than it should be. Single operators may be calls of
# ten microseconds.
LEAST = {
    "cifar10-64": 0.95,
    "captured": 0.95,
    "product": 0.5,
    "attention": 0.5,
    "conv3x3": 0.95,
    "group_norm_silu": 0.5,
    "ddim_step": 0.5,
}


@pytest.mark.full
@pytest.mark.skipif(DEVICE != "cpu" or native.module is None, reason="the C++ operators are for CPUs")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("limits", [{}, AVX2], ids=["own", "avx2"])
def test_every_cpu(benchmark, limits, tmp_path):
    if limits and native.module.instruction_set() != "avx512":
        pytest.skip("this machine has no more than AVX2")
    file = tmp_path / "rows.json"
    command = [sys.executable, Path(every_cpu.__file__), "--out", file]
    benchmark.group = "every CPU"
    table = benchmark.pedantic(subprocess.check_output, (command,), {"env": os.environ | limits, "text": True})
    print(f"\n{table}")
    rows = json.loads(file.read_text())["rows"]
    assert {row["operator"] for row in rows} == set(LEAST)
    slow = [row for row in rows if row["chosen"] and row["ratio"] < LEAST[row["operator"]]]
    assert not slow, "\n".join(map(str, slow))
    benchmark.extra_info["table"] = table
