"""ops/measured.py says what the committed results say."""

import json
import statistics
from pathlib import Path

import pytest

from ddim_fast.ops.measured import FASTER_IN_CPP

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*/every_cpu-*.json"))


def measured() -> dict[tuple[str, str, str, str], list[float]]:
    """PyTorch's time over ours by operator, instruction set, dtype and memory format: one number a shape."""
    ratios: dict[tuple[str, str, str, str], list[float]] = {}
    for file in RESULTS:
        for row in json.loads(file.read_text())["rows"]:
            key = (row["operator"], row["instruction set"], row["dtype"], row["memory format"])
            ratios.setdefault(key, []).append(row["ratio"])
    return ratios


def test_there_are_results_for_both_instruction_sets():
    assert {file.stem for file in RESULTS} >= {"every_cpu-avx2", "every_cpu-avx512"}


@pytest.mark.parametrize("row", sorted(FASTER_IN_CPP), ids="-".join)
def test_what_is_chosen_was_measured_to_be_faster(row):
    ratios = measured()[row]
    assert statistics.median(ratios) > 1.2
    # Single small images, of which Python's share is the most, may cost a few microseconds more.
    assert sum(ratio < 0.95 for ratio in ratios) <= 0.15 * len(ratios)
