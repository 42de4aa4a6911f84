"""The block tables of the norm's kernels, FORWARD and BACKWARD in kernels/group_norm_tiles.py, for the GPU that it runs on.

    python benchmarks/gpu/tune.py --out tune.json [--minutes 5]

At each shape at which the network calls the norm it times every largest tile and number of warps. It takes the largest tile
that is fastest in all calls together, and the fastest warps for each size of tile. It prints the tables as Python, to be
pasted, and writes them and all times as JSON. Shapes come in the order of their size; those that the minutes did not suffice
for are named. Without a GPU, TRITON_INTERPRET=1 and --batch 1 try the script, not the speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from every_cpu import in_turns, shapes_of
from measure import CALLS, DEVICE, machine, repeated
from peers import network, relative_error

from ddim_fast.kernels import group_norm_silu, group_norm_silu_backward, group_norm_tiles

Table = tuple[tuple[int, int], ...]

# What is tried: elements of the largest tile, and warps. The backward pass holds two tiles.
LARGEST = {"FORWARD": (16384, 32768, 65536), "BACKWARD": (8192, 16384, 32768)}
WARPS = (2, 4, 8, 16)

# The bucket of the smallest tiles.
SMALLEST = 2048

# Relative error to what the shipped table gives, in bfloat16; nothing but the order of sums differs.
TOLERANCE = 1e-2


class Shape(NamedTuple):
    """A call of the norm in one evaluation, in channels_last.

    Attributes:
        channels, skip, positions, groups: of the image.
        shifted: whether the time embedding is added.
        silu: whether there is one.
        calls: how often.
    """

    channels: int
    skip: int
    side: tuple[int, int]
    groups: int
    shifted: bool
    silu: bool
    calls: int

    @property
    def elements(self) -> int:
        return (self.channels + self.skip) * self.side[0] * self.side[1]


class Candidate(NamedTuple):
    """A table of one line, and the tile that it makes of a shape: its bucket in the table, and its sizes."""

    largest: int
    bucket: int
    warps: int
    groups_a_tile: int
    block_p: int
    block_c: int


def shapes(name: str) -> list[Shape]:
    """The norms of a network, those first that take most of the time."""
    found = [
        Shape(c, skip, (h, w), groups, shifted, silu, calls)
        for ((_, c, h, w), groups, silu, shifted, skip), calls in shapes_of(network(name).cpu(), 2)["group_norm_silu"].items()
    ]
    return sorted(found, key=lambda s: s.elements * s.calls, reverse=True)


def candidate(shape: Shape, largest: int, warps: int) -> Candidate:
    geometry = group_norm_tiles.choose_geometry(
        shape.channels, shape.skip, shape.side[0] * shape.side[1], shape.groups, torch.bfloat16, True, ((largest, warps),)
    )
    groups, block_p, block_c = (geometry.options[name] for name in ("GROUPS", "BLOCK_P", "BLOCK_C"))
    return Candidate(largest, max(SMALLEST, block_p * block_c), warps, groups, block_p, block_c)


def call_of(direction: str, shape: Shape, batch: int) -> Callable[[Table], Any]:
    """The kernel of a shape on random images, as a function of its table."""
    channels, generator = shape.channels + shape.skip, torch.Generator(DEVICE).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, generator=generator)

    def image(channels: int) -> torch.Tensor:
        return random(batch, channels, *shape.side).to(torch.bfloat16, memory_format=torch.channels_last)

    x, grad = image(shape.channels), image(channels)
    options = {
        "silu": shape.silu,
        "pre_shift": random(batch, channels) if shape.shifted else None,
        "skip": image(shape.skip) if shape.skip else None,
    }
    arguments = (x, shape.groups, random(channels), random(channels))

    def call(table: Table) -> Any:
        module = group_norm_silu if direction == "FORWARD" else group_norm_silu_backward
        before = getattr(module, direction)
        setattr(module, direction, table)
        try:
            if direction == "FORWARD":
                return group_norm_silu.group_norm_silu(*arguments, **options)
            return group_norm_silu_backward.group_norm_silu_backward(grad, *arguments, **options).x
        finally:
            setattr(module, direction, before)

    return call


def compile_one(direction: str, shape: Shape, table: Table) -> None:
    """Puts a kernel into Triton's cache on disk; the batch is no part of it. What does not fit the chip is found when timed."""
    try:
        call_of(direction, shape, 1)(table)
    except Exception as error:  # the exceptions of Triton's compiler have no common class
        print(f"{direction} {shape} {table}: {error}", file=sys.stderr)


def compile_all(work: Iterable[tuple[str, Shape, Table]]) -> None:
    """By all cores: compilers would take most of the minutes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=context) as pool:
        for future in [pool.submit(compile_one, *item) for item in work]:
            future.result()


def measure(direction: str, shape: Shape, batch: int) -> Iterator[dict[str, Any]]:
    """A row for each candidate; equal tiles are timed once."""
    call = call_of(direction, shape, batch)
    shipped = getattr(group_norm_tiles, direction)
    exact = call(shipped).double()
    seen: dict[tuple[int, ...], float | None] = {}
    for largest in LARGEST[direction]:
        for warps in WARPS:
            one = candidate(shape, largest, warps)
            tile = one[2:]
            if tile not in seen:
                seen[tile] = _microseconds(call, ((largest, warps),), exact)
            yield {"table": direction, **shape._asdict(), **one._asdict(), "microseconds": seen[tile]}


def _microseconds(call: Callable[[Table], Any], table: Table, exact: torch.Tensor) -> float | None:
    """None where the kernel does not fit the chip."""
    from triton.runtime.errors import OutOfResources

    try:
        error = relative_error(call(table).double(), exact)
    except OutOfResources:
        return None
    assert error < TOLERANCE, (table, error)
    return round(in_turns({"": repeated(lambda: call(table))}, 0.02)[""] / CALLS * 1e6, 2)


def fit(rows: list[dict[str, Any]]) -> Table:
    """The table of the least time: of one direction's rows, those of whole shapes. Sizes of tile that no shape has take the
    warps of the next larger one, and after the largest those of the last."""
    tables = [_fit(largest, [row for row in rows if row["largest"] == largest]) for largest in {row["largest"] for row in rows}]
    fitting = [(total, table) for total, table in tables if table]
    if not fitting:
        raise ValueError("no largest tile was measured at every shape")
    return min(fitting)[1]


def _fit(largest: int, rows: list[dict[str, Any]]) -> tuple[float, Table]:
    """The least time with this largest tile, and its table; an empty one where a size of tile fits with no number of warps."""
    total, lines = 0.0, []
    for bucket in sorted({row["bucket"] for row in rows}):
        times: dict[int, list[float | None]] = {}
        for row in rows:
            if row["bucket"] == bucket:
                microseconds = row["microseconds"]
                times.setdefault(row["warps"], []).append(None if microseconds is None else row["calls"] * microseconds)
        sums = {warps: sum(t for t in values if t is not None) for warps, values in times.items() if None not in values}
        if not sums:
            return 0.0, ()
        warps = min(sums, key=lambda w: (sums[w], w))
        total += sums[warps]
        lines.append((bucket, warps))
    if lines[-1][0] < largest:
        lines.append((largest, lines[-1][1]))
    return total, tuple(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10-128", metavar="NAME", help="a preset or packaged model (%(default)s)")
    parser.add_argument("--batch", type=int, default=512, metavar="N", help="images (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="begin no shape after so long (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write tables and times here")
    arguments = parser.parse_args()
    begin, norms = time.monotonic(), shapes(arguments.model)
    if DEVICE == "cuda":
        work = {
            (direction, shape, candidate(shape, largest, warps)[2:]): ((largest, warps),)
            for direction in LARGEST
            for shape in norms
            for largest in LARGEST[direction]
            for warps in WARPS
        }
        compile_all((direction, shape, table) for (direction, shape, _), table in work.items())
        print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    missing = []
    for shape in norms:  # forward and backward together, so that both tables come from the same shapes
        if time.monotonic() - begin > 60 * arguments.minutes:
            missing.append(shape)
            continue
        for direction in LARGEST:
            found = list(measure(direction, shape, arguments.batch))
            rows += found
            times = [row["microseconds"] for row in found if row["microseconds"] is not None]
            print(f"{direction} {shape}: {min(times)} to {max(times)} us", flush=True)
    if not rows:
        sys.exit(f"--minutes {arguments.minutes}: the time was up before the first shape; give more")
    tables = {direction: fit([row for row in rows if row["table"] == direction]) for direction in LARGEST}
    for direction, table in tables.items():
        print(f"{direction} = {table!r}  # now {getattr(group_norm_tiles, direction)!r}")
    for shape in missing:
        print(f"not measured: {shape}")
    if arguments.out:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = f'{{"machine": {json.dumps(machine())},\n"tables": {json.dumps(tables)},\n"rows": [\n'
        arguments.out.write_text(f"{head}{lines}\n]}}\n")


if __name__ == "__main__":
    main()
