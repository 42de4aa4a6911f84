"""Which benchmarks run, and what is printed and stored of them.

pytest benchmarks/ --benchmark-only            # a choice, in a quarter of an hour on two cores
pytest benchmarks/ --benchmark-only --full     # all networks, shapes, batches and dtypes
pytest benchmarks/ --benchmark-only -k batch1  # of all, those with that name
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import pytest
import report
from tqdm import tqdm

# What each file's table compares with.
BASELINES = {
    "test_unet": "diffusers fp32",
    "test_sampler": "diffusers fp32",
    "test_approximations": "20 steps fp32",
    "test_onnx": "step by step fp32",
    "test_conv3x3": "pytorch fp32",
    "test_group_norm_silu": "pytorch",
    "test_attention": "pytorch",
}

# What takes hours to measure.
FID = sorted(Path(__file__).parent.glob("results/*/fashion-mnist/evaluation.json"))

# By file, in the form of --benchmark-json.
_results: dict[str, list[dict[str, Any]]] = defaultdict(list)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: all cases instead of a choice")
    parser.addoption("--implementations", metavar="LIST", help="test_sampler.py: 'compiled bf16,captured bf16' instead of all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full") or config.getoption("-k"):
        return
    measure.SECONDS //= 2
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def progress(request: pytest.FixtureRequest) -> Iterator[tqdm]:
    with tqdm(total=len(request.session.items), unit="benchmark", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar


@pytest.fixture(autouse=True)
def keep(request: pytest.FixtureRequest, progress: tqdm) -> Iterator[None]:
    """Shows which benchmark runs, and keeps its result for the tables."""
    progress.set_description(request.node.name)
    yield
    progress.update()
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is not None and benchmark.stats is not None and not benchmark.has_error:
        result = {name: getattr(benchmark, name) for name in ("group", "name", "params", "extra_info")}
        _results[request.path.stem].append(result | {"stats": {"median": benchmark.stats.stats.median}})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for file, results in _results.items():
        if file in BASELINES:
            baseline = _baseline(file, results)
            terminalreporter.section(f"{file}: the time of {baseline} over each time")
            terminalreporter.write_line(report.table({"benchmarks": results}, baseline))
    if _results:
        terminalreporter.section("FID-512 of fashion-mnist: committed results, not of this run")
        rows = [row for file in FID for row in json.loads(file.read_text())["rows"]]
        terminalreporter.write_line(report.fid_table({"rows": rows}))


def _baseline(file: str, results: list[dict[str, Any]]) -> str:
    """The usual one; where it was not timed, as float32 on a GPU or what --implementations leaves out, the first that was."""
    timed = [name for result in results for name in result["extra_info"].get("evaluations/s", ())]
    return BASELINES[file] if not timed or BASELINES[file] in timed else timed[0]


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What decides how fast something is, and no name of anybody's machine."""
    machine_info.clear()
    machine_info.update(measure.machine())
