"""pytest-benchmark's JSON -> a table of ratios in Markdown.

    pytest benchmarks/test_group_norm_silu.py --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline compiled

One row a group (one shape, dtype and layout), one column an implementation: the baseline's time over its time, and its share
of the copy or matmul rate measured in the same run. Absolute times stand in the baseline's column; they mean something on a
GPU only.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["table"]


def table(run: dict[str, Any], baseline: str) -> str:
    """The Markdown table of one run.

    Raises:
        ValueError: no benchmark in the run has the baseline's name.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for benchmark in run["benchmarks"]:
        groups[benchmark["group"]][_implementation(benchmark)] = benchmark
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if baseline not in names:
        raise ValueError(f"the baseline must be one of {', '.join(names)}; got {baseline!r}")
    names = [baseline, *(name for name in names if name != baseline)]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for group, results in groups.items():
        cells = [_cell(results.get(name), results.get(baseline), name == baseline) for name in names]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _implementation(benchmark: dict[str, Any]) -> str:
    """Its name: what the benchmark's parameters call it, the function's name where they do not."""
    parameters = benchmark["params"] or {}
    function = benchmark["name"].split("[")[0].removeprefix("test_")
    return parameters.get("implementation") or parameters.get("backend") or function


def _cell(result: dict[str, Any] | None, baseline: dict[str, Any] | None, is_baseline: bool) -> str:
    if result is None:
        return "-"
    info, median = result["extra_info"], result["stats"]["median"]
    share = f"{info['share of matmul']:.0%} of matmul" if "share of matmul" in info else f"{info['share of copy']:.0%} of copy"
    if is_baseline:
        return f"{info['microseconds']:.1f} us, {share}"
    return f"{baseline['stats']['median'] / median:.2f}x, {share}" if baseline else share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--baseline", required=True, metavar="NAME", help="the implementation to compare with")
    arguments = parser.parse_args()
    try:
        print(table(json.loads(arguments.json.read_text()), arguments.baseline))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
