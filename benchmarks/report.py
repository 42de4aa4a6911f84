"""Results as tables in Markdown, and as a plot.

    pytest benchmarks/test_group_norm_silu.py --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline compiled                    # pytest-benchmark's JSON: ratios
    python benchmarks/report.py run.json --baseline "diffusers fp32" --plot speed.png   # of test_unet.py or test_sampler.py
    python benchmarks/report.py evaluation.json --plot fid.png                  # of ddim_fast.evaluate: FID by steps
    python benchmarks/report.py evaluation.json --plot fid.png --speed run.json # FID by seconds an image, of test_sampler.py

Of ratios one row a group (one shape, dtype and layout), one column an implementation: the baseline's time over its time, and
its share of the copy or matmul rate measured in the same run, or its error where the implementations differ in it. Absolute
times, or rates, stand in the baseline's column; they mean something on a GPU only.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["fastest", "fid_by_steps", "fid_table", "plot_fid", "plot_speeds", "speeds", "table"]


def table(run: dict[str, Any], baseline: str | None) -> str:
    """The Markdown table of one run.

    Raises:
        ValueError: no benchmark in the run has the baseline's name.
    """
    groups: dict[str, dict[str, _Result]] = defaultdict(dict)
    for benchmark in run["benchmarks"]:
        groups[benchmark["group"]] |= _results(benchmark)
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if baseline not in names:
        raise ValueError(f"the baseline must be one of {', '.join(names)}; got {baseline!r}")
    names = [baseline, *(name for name in names if name != baseline)]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for group, results in groups.items():
        cells = [_cell(results.get(name), results.get(baseline), name == baseline) for name in names]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


class _Result(NamedTuple):
    """How fast an implementation is, in the units of its group, as a number and in words; and what else is known of it: its
    share of the machine's rate, or its error."""

    speed: float
    absolute: str
    remark: str


def _results(benchmark: dict[str, Any]) -> dict[str, _Result]:
    """By implementation: all those that were timed in turns, or the one that was timed alone."""
    info = benchmark["extra_info"]
    for unit in ("images/s", "evaluations/s"):
        if unit in info:
            shares = info.get("share of matmul", {})
            remarks = {name: _share(shares.get(name), "matmul") for name in info[unit]}
            remarks |= {name: f"error {error:.3f}" for name, error in info.get("error", {}).items()}
            return {name: _Result(rate, f"{rate:.1f} {unit}", remarks[name]) for name, rate in info[unit].items()}
    rate = "matmul" if "share of matmul" in info else "copy"
    absolute = f"{info['microseconds']:.1f} us"
    return {
        _implementation(benchmark): _Result(1 / benchmark["stats"]["median"], absolute, _share(info[f"share of {rate}"], rate))
    }


def _share(share: float | None, rate: str) -> str:
    return "" if share is None else f"{share:.0%} of {rate}"


def _implementation(benchmark: dict[str, Any]) -> str:
    """Its name: what the benchmark's parameters call it, the function's name where they do not."""
    parameters = benchmark["params"] or {}
    function = benchmark["name"].split("[")[0].removeprefix("test_")
    return parameters.get("implementation") or parameters.get("backend") or function


def _cell(result: _Result | None, baseline: _Result | None, is_baseline: bool) -> str:
    if result is None:
        return "-"
    ratio = f"{result.speed / baseline.speed:.2f}x" if baseline else ""
    return ", ".join(part for part in (result.absolute if is_baseline else ratio, result.remark) if part)


def fid_by_steps(evaluation: dict[str, Any]) -> dict[str, dict[int, float]]:
    """FID-512 of deterministic samples without guidance: by solver and spacing, then by steps.

    Args:
        evaluation: the content of an ``evaluation.json`` of ``python -m ddim_fast.evaluate``.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in evaluation["rows"]:
        settings = row["settings"]
        bent = any(settings.get(name) for name in ("eta", "guidance", "guide", "tolerance"))
        if row.get("label") == "FID-512" and "solver" in settings and not bent:
            found[f"{settings['solver']}, {settings['spacing']}"][settings["steps"]] = row["FID-512"]
    return {name: dict(sorted(found[name].items())) for name in sorted(found)}


def fid_table(evaluation: dict[str, Any], columns: Sequence[int] = (5, 8, 10, 20, 50)) -> str:
    """:func:`fid_by_steps` as a Markdown table, a column a number of steps."""
    lines = [f"| steps | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in fid_by_steps(evaluation).items():
        if cells := [f"{values[steps]:.1f}" if steps in values else "-" for steps in columns if values.keys() & set(columns)]:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(run: dict[str, Any], model: str, dtype: str) -> tuple[float, str]:
    """Seconds of an evaluation of one image, by the fastest of our engines and batch sizes in a run of test_sampler.py, and the
    name of that engine with its group.

    Args:
        model, dtype: as in the settings of an ``evaluation.json``.

    Raises:
        ValueError: the run has no such model and dtype.
    """
    short = {"float32": "fp32", "bfloat16": "bf16"}.get(dtype, dtype)
    found = [
        (1 / rate, f"{name}, {benchmark['group']}")
        for benchmark in run["benchmarks"]
        if benchmark["group"].startswith(f"{model} batch ")
        for name, rate in benchmark["extra_info"].get("evaluations/s", {}).items()
        if name in {f"{engine} {short}" for engine in ("eager", "compiled", "captured")}
    ]
    if not found:
        raise ValueError(f"--speed has no run of {model} in {dtype}; give a file of test_sampler.py with one")
    return min(found)


_STYLES = ("-", "--", ":", "-.")


def plot_fid(evaluation: dict[str, Any], path: Path, speed: dict[str, Any] | None = None) -> None:
    """:func:`fid_by_steps` as a plot; against the time of an image by :func:`fastest` of the run ``speed``, if it is given.

    Raises:
        ValueError: the evaluation is of several models or dtypes, or the run has not its own.
    """
    from matplotlib import pyplot

    scale, label = 1.0, "steps"
    if speed is not None:
        measured = {
            (row["settings"]["model"], row["settings"]["dtype"])
            for row in evaluation["rows"]
            if row.get("label") == "FID-512" and "solver" in row["settings"]
        }
        if len(measured) != 1:
            raise ValueError(f"the time of an image is of one model and dtype; the evaluation has {sorted(measured)}")
        seconds, engine = fastest(speed, *measured.pop())
        scale, label = 1e3 * seconds, f"milliseconds an image ({engine})"
    found = fid_by_steps(evaluation)
    solvers, spacings = (list(dict.fromkeys(part)) for part in zip(*(name.split(", ") for name in found), strict=True))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, values in found.items():
        solver, spacing = name.split(", ")
        color, style = f"C{solvers.index(solver)}", _STYLES[spacings.index(spacing) % len(_STYLES)]
        x = [scale * steps for steps in values]
        axes.plot(x, list(values.values()), marker="o", markersize=3, label=name, color=color, linestyle=style)
    axes.set(xscale="log", xlabel=label, ylabel="FID-512")
    ticks = [scale * steps for steps in sorted(set().union(*found.values()))]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def speeds(run: dict[str, Any]) -> list[tuple[str, int, int, float]]:
    """Implementation, batch size, steps (1 for one evaluation of the network) and images a second, of a run of test_unet.py or
    test_sampler.py."""
    found = []
    for benchmark in run["benchmarks"]:
        sizes = re.search(r"batch (\d+)(?: steps (\d+))?$", benchmark["group"])
        rates = benchmark["extra_info"].get("images/s") or benchmark["extra_info"].get("evaluations/s")
        if sizes and rates:
            batch, steps = int(sizes[1]), int(sizes[2] or 1)
            found += [(name, batch, steps, rate) for name, rate in rates.items()]
    return found


def plot_speeds(run: dict[str, Any], path: Path) -> None:
    """:func:`speeds` as two plots: images a second against the batch size, and milliseconds an image against the steps."""
    from matplotlib import pyplot

    by_batch: dict[str, dict[int, float]] = defaultdict(dict)
    by_steps: dict[str, dict[int, float]] = defaultdict(dict)
    found = speeds(run)
    steps_shown, batch_shown = (max(row[i] for row in found) for i in (2, 1))
    for name, batch, steps, rate in found:
        if steps == steps_shown:
            by_batch[name][batch] = rate
        if batch == batch_shown:
            by_steps[name][steps] = 1e3 / rate
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, lines in ((left, by_batch), (right, by_steps)):
        for name, values in lines.items():
            axes.plot(*zip(*sorted(values.items()), strict=True), marker="o", markersize=3, label=name)
    left.set(xscale="log", xlabel="batch size", ylabel="images/s", title=f"{steps_shown} steps")
    right.set(xlabel="steps", ylabel="ms/image", title=f"batch size {batch_shown}")
    left.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what --benchmark-json or ddim_fast.evaluate wrote")
    parser.add_argument("--baseline", metavar="NAME", help="the implementation to compare with")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="FID against steps; or speed against batch and steps")
    parser.add_argument(
        "--speed", type=Path, metavar="RUN.json", help="of test_sampler.py: plot FID against seconds an image, not steps"
    )
    arguments = parser.parse_args()
    try:
        content = json.loads(arguments.json.read_text())
        is_evaluation = "rows" in content
        print(fid_table(content) if is_evaluation else table(content, arguments.baseline))
        if arguments.plot is None:
            return
        if is_evaluation:
            speed = None if arguments.speed is None else json.loads(arguments.speed.read_text())
            plot_fid(content, arguments.plot, speed)
        else:
            plot_speeds(content, arguments.plot)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
