"""The C++ operators beside PyTorch's, at each shape at which the networks call them, one evaluation of cifar10-64, and the
captured engine beside the eager one.

    python benchmarks/every_cpu.py [--out FILE.json]

uses what the processor has. With DDIM_FAST_CPU=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and ATEN_CPU_CAPABILITY=avx2 both sides are held
to AVX2, which is nearly what a processor without AVX-512 would do (its caches are its own). Each result is checked before it is
timed, and the two sides take turns. The files are what ddim_fast/ops/measured.py rests on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import machine
from peers import network, relative_error
from torch import Tensor
from torch.nn import functional

from ddim_fast import Sampler, UNet
from ddim_fast.diffusion.network import Network
from ddim_fast.engine.captured_cpu import CapturedOnCpu
from ddim_fast.engine.plan import Plan
from ddim_fast.models import unet_blocks
from ddim_fast.ops import native
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_reference, prepare_conv3x3
from ddim_fast.ops.ddim_step import ddim_step, ddim_step_reference
from ddim_fast.ops.devices import bf16_is_fast, keep_memory
from ddim_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_reference
from ddim_fast.ops.measured import instruction_set, is_faster_in_cpp

MODELS = ("cifar10-128", "cifar10-64", "cifar10-small", "fashion-mnist", "spoken-digits")
BATCHES = (1, 8)
ENGINE_MODELS, ENGINE_BATCHES = ("cifar10-64", "fashion-mnist"), (1, 8, 64)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

# Of each case, at least so many turns and so many seconds.
TURNS, SECONDS = 15, 0.1

Calls = dict[str, Callable[[], Tensor]]


def in_turns(calls: Calls, seconds: float = SECONDS) -> dict[str, float]:
    """The median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while len(times[next(iter(calls))]) < TURNS or time.perf_counter() - begin < seconds:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def shapes_of(model: UNet, batch: int) -> dict[str, Counter]:
    """How often one evaluation calls conv3x3 and group_norm_silu with what, by what decides how long that takes."""
    seen: dict[str, Counter] = {"conv3x3": Counter(), "group_norm_silu": Counter()}

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual=None, upsample=False, **_: Any) -> Tensor:
        seen["conv3x3"][tuple(x.shape), tuple(weight.shape[:2]), residual is not None, upsample] += 1
        return conv3x3_reference(x, weight, bias, residual=residual, upsample=upsample)

    def normalise(x: Tensor, groups: int, *numbers: Any, silu: bool = True, pre_shift=None, skip=None) -> Tensor:
        seen["group_norm_silu"][tuple(x.shape), groups, silu, pre_shift is not None, 0 if skip is None else skip.shape[1]] += 1
        return group_norm_silu_reference(x, groups, *numbers, silu=silu, pre_shift=pre_shift, skip=skip)

    originals = unet_blocks.conv3x3, unet_blocks.group_norm_silu
    unet_blocks.conv3x3, unet_blocks.group_norm_silu = convolve, normalise
    try:
        model(torch.randn(batch, *model.config.image_shape), torch.tensor(500))
    finally:
        unet_blocks.conv3x3, unet_blocks.group_norm_silu = originals
    return seen


def conv3x3_cases(shape: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Calls, Tensor]]:
    (n, c, h, w), (k, _), with_residual, upsample = shape
    x = torch.randn(n, c, h, w).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(k, c, 3, 3) / (3 * c**0.5), torch.randn(k)
    scale = 2 if upsample else 1
    residual = torch.randn(n, k, scale * h, scale * w).to(dtype, memory_format=torch.channels_last) if with_residual else None
    options = {"residual": residual, "upsample": upsample}
    exact = conv3x3_reference(x.double(), weight.double(), bias.double(), residual=None, upsample=upsample)
    exact = exact if residual is None else exact + residual.double()
    prepared = prepare_conv3x3(weight, dtype, size=None if upsample else (h, w))
    narrow, narrow_bias = weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)
    first = {"x": x.contiguous(), "residual": None if residual is None else residual.contiguous()}
    yield (
        "channels_last",
        {
            "ours": lambda: conv3x3(x, weight, bias, prepared=prepared, **options),
            "pytorch": lambda: conv3x3_reference(x, narrow, narrow_bias, **options),
            "pytorch contiguous": lambda: conv3x3_reference(
                first["x"], weight.to(dtype), narrow_bias, residual=first["residual"], upsample=upsample
            ),
        },
        exact,
    )


def group_norm_silu_cases(shape: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Calls, Tensor]]:
    for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        yield (name, *_group_norm_silu_case(shape, dtype, layout))


def _group_norm_silu_case(shape: tuple, dtype: torch.dtype, layout: torch.memory_format) -> tuple[Calls, Tensor]:
    (n, c, h, w), groups, silu, shifted, skipped = shape
    channels = c + skipped
    x = torch.randn(n, c, h, w).to(dtype, memory_format=layout)
    weight, bias = torch.randn(channels), torch.randn(channels)
    options = {
        "pre_shift": torch.randn(n, channels) if shifted else None,
        "skip": torch.randn(n, skipped, h, w).to(dtype, memory_format=layout) if skipped else None,
    }
    wide = {name: None if t is None else t.double() for name, t in options.items()}
    calls = {
        "ours": lambda: group_norm_silu(x, groups, weight, bias, 1e-6, silu=silu, **options),
        "pytorch": lambda: group_norm_silu_reference(x, groups, weight, bias, 1e-6, silu=silu, **options),
    }
    return calls, group_norm_silu_reference(x.double(), groups, weight.double(), bias.double(), 1e-6, silu=silu, **wide)


def ddim_step_cases(shape: tuple, dtype: torch.dtype) -> Iterator[tuple[str, Calls, Tensor]]:
    x, output = torch.randn(2, *shape).to(dtype)
    coefficients = (1.2, -0.6, 0.3, 0.9, 0.8, 0.5, 0.0)
    yield (
        "contiguous",
        {
            "ours": lambda: ddim_step(x, output, coefficients),
            "pytorch": lambda: ddim_step_reference(x, output, coefficients),
        },
        ddim_step_reference(x.double(), output.double(), coefficients),
    )


CASES = {"conv3x3": conv3x3_cases, "group_norm_silu": group_norm_silu_cases, "ddim_step": ddim_step_cases}


def operators() -> Iterator[dict[str, Any]]:
    """A row for each operator, dtype, memory format and shape. ``ratio``: PyTorch's time over that of the C++ operator."""
    dtypes = [torch.float32, *([torch.bfloat16] if bf16_is_fast(torch.device("cpu")) else [])]
    counts: dict[str, Counter] = {"conv3x3": Counter(), "group_norm_silu": Counter(), "ddim_step": Counter()}
    for model in (network(name) for name in MODELS):
        for batch in BATCHES:
            counts["ddim_step"][(batch, *model.config.image_shape)] += 1
            for operator, shapes in shapes_of(model, batch).items():
                counts[operator] += shapes
    os.environ["DDIM_FAST_BACKEND"] = "native"
    for operator, shapes in counts.items():
        for shape, count in shapes.items():
            for dtype in dtypes:
                for memory_format, calls, exact in CASES[operator](shape, dtype):
                    error = relative_error(calls["ours"]().double(), exact)
                    assert error < TOLERANCE[dtype], (operator, shape, dtype, error)
                    seconds = in_turns(calls)
                    ours = seconds.pop("ours")
                    yield {
                        "operator": operator,
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "memory format": memory_format,
                        "instruction set": instruction_set(dtype),
                        "calls": count,
                        "chosen": is_faster_in_cpp(operator, dtype, memory_format),
                        "microseconds": round(ours * 1e6, 1),
                        "ratio": round(min(seconds.values()) / ours, 3),
                    }
    del os.environ["DDIM_FAST_BACKEND"]


def evaluations() -> Iterator[dict[str, Any]]:
    """cifar10-64 as the sampler has it, beside the same with PyTorch's operators."""
    for batch in BATCHES:
        calls = {backend: _evaluation(network("cifar10-64"), batch, backend) for backend in ("", "reference")}
        assert relative_error(calls[""](), calls["reference"]()) < 1e-5
        seconds = in_turns(calls, 5.0)
        yield {
            "operator": "cifar10-64",
            "shape": [batch, 3, 32, 32],
            "dtype": "float32",
            "memory format": "channels_last",
            "instruction set": instruction_set(torch.float32),
            "calls": 1,
            "chosen": True,
            "microseconds": round(seconds[""] * 1e6, 1),
            "ratio": round(seconds["reference"] / seconds[""], 3),
        }


def plan_operators() -> Iterator[dict[str, Any]]:
    """The operators that only plans have, product and attention, at the shapes of the networks' plans. ``ratio``: the time of
    PyTorch's operator over that of a plan of this one call."""
    dtypes = [torch.float32, *([torch.bfloat16] if bf16_is_fast(torch.device("cpu")) else [])]
    for dtype in dtypes:
        counts: Counter = Counter()
        for name, batch in itertools.product(MODELS, BATCHES):
            sampler = Sampler(network(name), steps=1, engine="captured", dtype=dtype)
            for operator, _, integers, _ in recorded(sampler, batch).calls:
                if operator in ("product", "attention"):
                    counts[operator, tuple(integers)] += 1
        for (operator, integers), count in counts.items():
            inputs, function = (attention_call if operator == "attention" else product_call)(integers, dtype)
            engine = CapturedOnCpu()
            result = engine.run(_apply, inputs, function)
            exact = function(*(t.double() for t in inputs))
            assert relative_error(result.double(), exact) < TOLERANCE[dtype], (operator, integers, dtype)
            (recording,) = engine.recordings.values()
            calls = {"ours": functools.partial(recording.plan.run, 0), "pytorch": functools.partial(function, *inputs)}
            seconds = in_turns(calls)
            yield {
                "operator": operator,
                "shape": integers[1:13],
                "dtype": str(dtype).removeprefix("torch."),
                "memory format": "channels_last",
                "instruction set": instruction_set(dtype),
                "calls": count,
                "chosen": True,
                "microseconds": round(seconds["ours"] * 1e6, 1),
                "ratio": round(seconds["pytorch"] / seconds["ours"], 3),
            }


def recorded(sampler: Sampler, batch: int) -> Plan:
    """The plan of a batch."""
    sampler.sample(x_T=torch.randn(batch, *sampler.image_shape))
    engine: Any = sampler._engine
    return next(iter(engine.recordings.values())).plan


def product_call(integers: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Images and a convolution of these sizes, in the order of csrc/plan.cpp; a linear layer where that is one."""
    _, n, height, width, channels, _, _, out, rows, columns, down, right, top, left = integers
    weight = torch.randn(out, channels, rows, columns) / (channels * rows * columns) ** 0.5
    weights = {d: weight.to(d, memory_format=torch.channels_last) for d in (dtype, torch.float64)}
    if height == width == rows == columns == 1:
        x = torch.randn(n, channels).to(dtype)
        return (x,), lambda x: functional.linear(x, weights[x.dtype].flatten(1))
    x = torch.randn(n, channels, height, width).to(dtype, memory_format=torch.channels_last)
    if top != rows // 2:  # padded on the right and below
        return (x,), lambda x: functional.conv2d(functional.pad(x, (0, 1, 0, 1)), weights[x.dtype], stride=(down, right))
    return (x,), lambda x: functional.conv2d(x, weights[x.dtype], stride=(down, right), padding=(top, left))


def attention_call(integers: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Tokens of these sizes, as linear layers leave them."""
    _, n, heads, queries, keys, dim = integers[:6]
    tokens = [torch.randn(n, count, heads, dim).to(dtype).transpose(1, 2) for count in (queries, keys, keys)]
    return tuple(tokens), functional.scaled_dot_product_attention


def _apply(engine: Any, inputs: tuple[Tensor, ...], function: Callable[..., Tensor]) -> Tensor:
    return function(*inputs)


def engines() -> Iterator[dict[str, Any]]:
    """Whole runs of five steps by the captured engine. ``ratio``: the eager engine's time over its own."""
    dtypes = [torch.float32, *([torch.bfloat16] if bf16_is_fast(torch.device("cpu")) else [])]
    for name, batch, dtype in itertools.product(ENGINE_MODELS, ENGINE_BATCHES, dtypes):
        model, x = network(name), torch.randn(batch, *network(name).config.image_shape)
        runs = {
            engine: functools.partial(Sampler(model, steps=5, engine=engine, dtype=dtype).sample, x_T=x)
            for engine in ("captured", "eager")
        }
        assert relative_error(runs["captured"](), runs["eager"]()) < (1e-4 if dtype == torch.float32 else 0.05)
        seconds = in_turns(runs, 3.0)
        yield {
            "operator": "captured",
            "shape": [name, batch],
            "dtype": str(dtype).removeprefix("torch."),
            "memory format": "channels_last",
            "instruction set": instruction_set(dtype),
            "calls": 1,
            "chosen": is_faster_in_cpp("captured", dtype, "channels_last"),
            "microseconds": round(seconds["captured"] * 1e6, 1),
            "ratio": round(seconds["eager"] / seconds["captured"], 3),
        }


def _evaluation(model: UNet, batch: int, backend: str) -> Callable[[], Tensor]:
    """One evaluation with DDIM_FAST_BACKEND=backend."""
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(0))
    os.environ["DDIM_FAST_BACKEND"] = backend
    ready = Network(model, torch.float32)
    conditions, index = ready.conditions(torch.tensor([500]), None, False), torch.tensor(0)

    def evaluate() -> Tensor:
        os.environ["DDIM_FAST_BACKEND"] = backend
        return ready(x, conditions, index)[0]

    return evaluate


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each operator, dtype and memory format."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["instruction set"], row["dtype"], row["memory format"]), []).append(row)
    lines = ["| operator | instruction set | dtype | memory format | shapes | least | median | most | C++ |", "|" + "---|" * 9]
    for key, members in groups.items():
        ratios = [row["ratio"] for row in members]
        numbers = f"{min(ratios):.2f} | {statistics.median(ratios):.2f} | {max(ratios):.2f}"
        lines.append(f"| {' | '.join(key)} | {len(ratios)} | {numbers} | {'yes' if members[0]['chosen'] else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows here")
    arguments = parser.parse_args()
    if native.module is None:
        sys.exit(f"There is nothing to compare with PyTorch: {native.why_not}")
    torch.manual_seed(0)
    keep_memory(torch.device("cpu"))
    with torch.no_grad():
        rows = [*evaluations(), *engines(), *plan_operators(), *operators()]
    print(table(rows))
    print("\nPyTorch's time over that of the C++ operators, eager's over captured's; last column: whether ours are chosen.")
    if arguments.out:
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.out.write_text(f'{{"machine": {json.dumps(machine())},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
