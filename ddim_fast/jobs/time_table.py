"""The time of a run by kind of operator: a table from a Chrome trace of torch.profiler."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["RUN", "SOLVER_STEP", "Profile", "Row", "time_table"]

# The names of ranges: the whole run, and the solver's part of a step.
RUN, SOLVER_STEP = "ddim_fast.run", "ddim_fast::solver_step"

_CONVOLUTIONS, _PRODUCTS, _ATTENTION, _NORMS = "convolutions", "matrix products", "attention", "norms with SiLU"
_SOLVER, _FUSED, _REST, _GAPS = "solver", "fused by torch.compile", "the rest", "gaps"
_LINES = (_CONVOLUTIONS, _PRODUCTS, _ATTENTION, _NORMS, _SOLVER, _FUSED, _REST)

# The kind of a range on the host by its name: the first match.
_OPERATORS = {
    _SOLVER: r"ddim_fast::(solver_step|ddim_step)",
    _ATTENTION: r"::attention|scaled_dot_product|_attention_",
    _NORMS: r"::\w*(group|layer|batch|instance|rms)_norm",
    _CONVOLUTIONS: r"::\w*conv(\d|olution)",
    _PRODUCTS: r"ddim_fast::product|::_?(linear|matmul|einsum|(add|badd|addb|int_|scaled_)?(b?mm|mv))_?$|_linear_pointwise",
}

# The same for kernels of a GPU and for torch.compile's kernels. A fused kernel with a norm counts as a norm; "tem" are
# templates of products and convolutions.
_KERNELS = {
    _NORMS: r"native_group_norm|group_norm_silu_kernel|chunk_statistics|^merge_kernel|GroupNorm|RowwiseMoments",
    _FUSED: r"cpp_fused|^triton_(?!tem_)",
    _ATTENTION: r"flash|fmha|sdpa|attention|softmax",
    _CONVOLUTIONS: r"conv(?!ert)|fprop|winograd|implicit_gemm|nchwToNhwc|nhwcToNchw",
    _PRODUCTS: r"gemm|gemv|cutlass|nvjet|cublas|split_?[kK]|(add|b|_)mm",
    _SOLVER: r"ddim_step",
}


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: a kind of operators, or ``gaps``.
        milliseconds: the time of the operators of this kind.
        calls: the number of operators, only the outermost of nested ones; on a GPU, the number of kernels.
    """

    name: str
    milliseconds: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """The time of a sampled batch by kind of operator. ``str`` is a table.

    Attributes:
        title: the description of the run.
        milliseconds: the time from the request to the images.
        rows: each kind of operators, and gaps; their times add up to ``milliseconds``.
        on_gpu: whether the times are of a GPU's kernels; otherwise of operators on the calling thread.
        served: by operator of this package, the implementations that computed it, as in
            :func:`ddim_fast.ops.recording.recorded_operators`.
    """

    title: str
    milliseconds: float
    rows: tuple[Row, ...]
    on_gpu: bool
    served: Mapping[str, Sequence[str]]

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [self.title, f"{'':{width}}  {'ms':>10}  {'share':>7}  {'kernels' if self.on_gpu else 'calls':>7}"]
        total = Row("sum", sum(row.milliseconds for row in self.rows), sum(row.calls for row in self.rows))
        for name, milliseconds, calls in (*self.rows, total):
            share = milliseconds / self.milliseconds
            lines.append(f"{name:{width}}  {milliseconds:10.1f}  {share:7.1%}  {calls or '':>7}".rstrip())
        served = ", ".join(f"{operator} {' and '.join(backends)}" for operator, backends in self.served.items())
        return "\n".join([*lines, f"implementations: {served or 'all by torch.compile'}"])


class _Range(NamedTuple):
    """The time in which ``name`` ran, in microseconds."""

    start: float
    end: float
    name: str
    correlation: Any = None


def time_table(events: Sequence[Mapping[str, Any]], on_gpu: bool) -> tuple[float, tuple[Row, ...]]:
    """The milliseconds of the range :data:`RUN` in a trace, and their rows by kind.

    Args:
        events: the list ``traceEvents`` of a Chrome trace.
        on_gpu: whether the run ends with the GPU's kernels; the times are then theirs.

    Raises:
        ValueError: the trace has no such range.
    """
    run = next((e for e in events if e.get("name") == RUN and e.get("cat") == "user_annotation"), None)
    if run is None:
        raise ValueError(f"the trace has no range {RUN}")
    start, end = run["ts"], run["ts"] + run["dur"]
    thread = [e for e in events if e.get("tid") == run["tid"] and e.get("ph") == "X" and e is not run]
    ranges = _ranges(thread, ("cpu_op", "user_annotation"), start, end)
    operators = [r for r in ranges if _is_operator(r.name)]
    named = list(_outermost(r for r in operators if _kind(r.name) is not None))
    if on_gpu:
        launches = {r.correlation: r.start for r in _ranges(events, ("cuda_runtime", "cuda_driver"), start, end)}
        spent = list(_kernel_times(_ranges(events, ("kernel", "gpu_memcpy", "gpu_memset"), start, end), named, launches, end))
    else:
        spent = list(_operator_times(operators, named))
    times, calls = dict.fromkeys(_LINES, 0.0), dict.fromkeys(_LINES, 0)
    for kind, microseconds, count in spent:
        times[kind] += microseconds / 1000
        calls[kind] += count
    wall = (end - start) / 1000
    rows = [Row(kind, times[kind], calls[kind]) for kind in _LINES]
    return wall, (*rows, Row(_GAPS, wall - sum(times.values()), 0))


def _ranges(events: Iterable[Mapping[str, Any]], categories: Sequence[str], start: float, end: float) -> list[_Range]:
    """The ranges of these categories that begin from ``start`` to ``end``, in order, an outer range before its inner ones."""
    found = [
        _Range(e["ts"], e["ts"] + e["dur"], e["name"], e.get("args", {}).get("correlation"))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in categories and start <= e["ts"] < end
    ]
    return sorted(found, key=lambda r: (r.start, -r.end))


def _outermost(ranges: Iterable[_Range]) -> Iterator[_Range]:
    """The outermost of nested ranges."""
    end = float("-inf")
    for r in ranges:
        if r.start >= end:
            yield r
            end = r.end


def _operator_times(operators: Sequence[_Range], named: Sequence[_Range]) -> Iterator[tuple[str, float, int]]:
    """Kind, microseconds and calls of operators on the host. The rest is operators without a kind, minus those inside them."""
    for r in named:
        yield _kind(r.name) or _REST, r.end - r.start, 1
    outermost, known = list(_outermost(operators)), set(named)
    yield (
        _REST,
        sum(r.end - r.start for r in outermost) - sum(r.end - r.start for r in named),
        sum(r not in known for r in outermost),
    )


def _kernel_times(
    kernels: Sequence[_Range], named: Sequence[_Range], launches: Mapping[Any, float], end: float
) -> Iterator[tuple[str, float, int]]:
    """The same for kernels, in the order of their starts. A kernel has the kind of the operator that launched it; in a CUDA
    graph, or if that operator has no kind, its name decides. Overlapping time counts for the first kernel."""
    starts, busy = [r.start for r in named], float("-inf")
    for kernel in kernels:
        launched = launches.get(kernel.correlation, float("-inf"))
        number = bisect.bisect_right(starts, launched) - 1
        inside = number >= 0 and launched < named[number].end
        kind = _kind(named[number].name) if inside else _first(_KERNELS, kernel.name)
        stop = min(kernel.end, end)
        yield kind or _REST, max(0.0, stop - max(kernel.start, busy)), 1
        busy = max(busy, stop)


def _is_operator(name: str) -> bool:
    """Whether a range on the host is an operator, not a frame around operators."""
    return re.match(r"\w+::", name) is not None or _is_generated(name)


def _is_generated(name: str) -> bool:
    return re.match(r"triton_|(graph_\d+_)?cpp_", name) is not None


def _kind(name: str) -> str | None:
    """The kind of an operator on the host; None for the rest."""
    return _first(_KERNELS if _is_generated(name) else _OPERATORS, name)


def _first(patterns: Mapping[str, str], name: str) -> str | None:
    return next((kind for kind, pattern in patterns.items() if re.search(pattern, name)), None)
