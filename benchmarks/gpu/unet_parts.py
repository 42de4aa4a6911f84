"""What no result has chosen on a GPU yet, beside PyTorch's, at each shape at which the network calls it, and the whole network
with and without: a convolution's bias and residual in one pass (add_bias), an enlarged image's convolution (conv3x3_enlarged),
a halved image's convolution without a padded copy (downsample), and query, key and value from one product (projections).

    python benchmarks/gpu/unet_parts.py --out benchmarks/results/GPU/unet_parts.json

Each result is checked before it is timed: its error is at most twice PyTorch's. The sides take turns, as CUDA graphs. The last
lines are the rows for FASTER_ON_GPU in ddim_fast/ops/measured.py. Without a GPU, TRITON_INTERPRET=1 tries the script, not the
speed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from every_cpu import in_turns, shapes_of
from measure import CALLS, DEVICE, machine, repeated
from peers import network, relative_error

from ddim_fast import UNet
from ddim_fast.diffusion.network import Network
from ddim_fast.ops import measured
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_reference, prepare_conv3x3

OPERATORS = ("add_bias", "conv3x3_enlarged", "downsample", "projections")
HEAD_DIM = 64

# A kind is chosen if it is faster in all calls of an evaluation together, and slower at no shape by more than this.
SLOWEST = 0.95

Case = tuple[list[Any], str, dict[str, Callable[[], Tensor]], Tensor]


@contextlib.contextmanager
def chosen(operators: tuple[str, ...], dtype: torch.dtype) -> Iterator[None]:
    """A context in which these operators of ours serve, and PyTorch's for the others; on a CPU all or none."""
    if DEVICE == "cpu":
        os.environ["DDIM_FAST_BACKEND"] = "triton" if operators else "reference"
        try:
            yield
        finally:
            del os.environ["DDIM_FAST_BACKEND"]
        return
    before = measured.FASTER_ON_GPU
    measured.FASTER_ON_GPU = frozenset((name, capability(), _name(dtype), "channels_last") for name in operators)
    try:
        yield
    finally:
        measured.FASTER_ON_GPU = before


def capability() -> str:
    return measured.compute_capability(torch.device(DEVICE, 0)) if DEVICE == "cuda" else "interpreter"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, device=DEVICE)
    return values.to(dtype, memory_format=torch.channels_last) if len(shape) == 4 else values.to(dtype)


def convolutions(model: UNet, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Case]]:
    """add_bias where a residual is added, conv3x3_enlarged where images are enlarged; both with the convolution."""
    for ((_, c, h, w), (k, _), has_residual, upsample), count in shapes_of(model, 2)["conv3x3"].items():
        if not (has_residual or upsample):
            continue  # the norm that follows adds the bias
        operator = "conv3x3_enlarged" if upsample else "add_bias"
        x, weight = _random(batch, c, h, w, dtype=dtype), _random(k, c, 3, 3) / (3 * c**0.5)
        narrow = weight.to(dtype)
        bias = None if upsample else _random(k, dtype=dtype)
        residual = _random(batch, k, h, w, dtype=dtype) if has_residual else None
        with chosen((operator,), dtype):
            prepared = prepare_conv3x3(weight, dtype) if upsample else None
        # A few images: in float64 a batch of 512 takes long, and memory.
        exact = conv3x3_reference(x[:2].double(), weight.double(), None if bias is None else bias.double(), upsample=upsample)
        exact = exact if residual is None else exact + residual[:2].double()
        options = {"residual": residual, "upsample": upsample}
        calls = {
            "ours": functools.partial(conv3x3, x, narrow, bias, prepared=prepared, **options),
            "pytorch": functools.partial(conv3x3_reference, x, narrow, bias, **options),
        }
        yield operator, count, ([batch, c, k, h, w], "channels_last", calls, exact)


def halvings(model: UNet, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Case]]:
    """The convolutions with stride 2 that pad right and bottom."""
    for level, block in enumerate(model.down_blocks):
        if block.downsamplers is None or model.config.downsample_padding:
            continue
        module = copy.deepcopy(block.downsamplers[0]).to(DEVICE)
        shape = [batch, module.conv.in_channels, *model.config.level_size(level)]
        x = _random(*shape, dtype=dtype)
        exact = copy.deepcopy(module).double()(x[:2].double())
        module.to(dtype, memory_format=torch.channels_last)
        call = functools.partial(module, x)
        yield "downsample", 1, (shape, "channels_last", {"ours": call, "pytorch": call}, exact)


def projections(model: UNet, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, int, Case]]:
    """Query, key and value of several heads from three products or one, with the attention that reads them."""
    for ((_, c, h, w), _, silu, _, _), count in shapes_of(model, 2)["group_norm_silu"].items():
        if silu or c % HEAD_DIM:
            continue  # the norm before an attention has no SiLU
        tokens, weight, bias = _random(batch, h * w, c), _random(3 * c, c) / c**0.5, _random(3 * c)
        tokens, narrow = tokens.to(dtype), (weight.to(dtype), bias.to(dtype))
        parts = [(w.contiguous(), b.contiguous()) for w, b in zip(*(t.chunk(3) for t in narrow), strict=True)]

        def attend(projected: Any) -> Tensor:
            q, k, v = (t.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for t in projected)
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        def joined(tokens=tokens, narrow=narrow, attend=attend) -> Tensor:
            return attend(functional.linear(tokens, *narrow).chunk(3, dim=2))

        def separate(tokens=tokens, parts=parts, attend=attend) -> Tensor:
            return attend([functional.linear(tokens, *part) for part in parts])

        exact = attend(functional.linear(tokens[:2].double(), *(t.double() for t in narrow)).chunk(3, dim=2))
        yield "projections", count, ([batch, h * w, c], "channels_last", {"ours": joined, "pytorch": separate}, exact)


def evaluations(model: UNet, batch: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """The network as the sampler has it, with each operator alone and with all."""
    x, index = _random(batch, *model.config.image_shape), torch.tensor(0, device=DEVICE)
    sets = {"none": (), **{name: (name,) for name in OPERATORS[:3]}, "all": OPERATORS}
    calls, exact = {}, model(x[:2], torch.tensor(500, device=DEVICE))
    for name, operators in sets.items():
        with chosen(operators, dtype):
            ready = Network(model, dtype)
            conditions = ready.conditions(torch.tensor([500], device=DEVICE), None, False)
            call = functools.partial(lambda ready, conditions: ready(x, conditions, index)[0], ready, conditions)
            assert relative_error(call()[:2], exact) < 3e-2, name
            calls[name] = _graph(call, operators, dtype)
    seconds = in_turns(calls, 2.0 if DEVICE == "cuda" else 0.0)
    for name, value in seconds.items():
        ratio = seconds["none"] / value
        yield _row("evaluation", [batch], "channels_last", dtype, 1, value, ratio) | {"with": name}


def _graph(call: Callable[[], Tensor], operators: tuple[str, ...], dtype: torch.dtype) -> Callable[[], Any]:
    """``call`` as a CUDA graph, recorded where ``operators`` are chosen; on a CPU a call in which they are."""

    def run() -> Any:
        with chosen(operators, dtype):
            return call()

    return repeated(run)


def _row(operator: str, shape: Any, memory_format: str, dtype: torch.dtype, calls: int, seconds: float, ratio: float) -> dict:
    return {
        "operator": operator,
        "shape": shape,
        "dtype": _name(dtype),
        "memory format": memory_format,
        "compute capability": capability(),
        "calls": calls,
        "microseconds": round(seconds / CALLS * 1e6, 1),
        "ratio": round(ratio, 3),
    }


def rows(model: UNet, batch: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each operator and shape. ``ratio``: PyTorch's time over ours; ``error``: of ours, relative to float64."""
    cpu_model = model.cpu()
    cases = itertools.chain(*(find(cpu_model, batch, dtype) for find in (convolutions, halvings, projections)))
    for operator, count, (shape, memory_format, calls, exact) in cases:
        graphs, errors = {}, {}
        for name, call in calls.items():
            operators = (operator,) if name == "ours" else ()
            with chosen(operators, dtype):
                errors[name] = relative_error(call()[:2].double(), exact)
            graphs[name] = _graph(call, operators, dtype)
        assert errors["ours"] <= 2 * errors["pytorch"], (operator, shape, errors)
        seconds = in_turns(graphs)
        row = _row(operator, shape, memory_format, dtype, count, seconds["ours"], seconds["pytorch"] / seconds["ours"])
        yield row | {"error": errors["ours"], "error of PyTorch's": errors["pytorch"]}
    yield from evaluations(model.to(DEVICE), batch, dtype)


def faster(measured_rows: list[dict[str, Any]]) -> frozenset[tuple[str, str, str, str]]:
    """The rows of FASTER_ON_GPU that these results allow."""
    kinds: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in measured_rows:
        if row["operator"] in OPERATORS:
            kind = (row["operator"], row["compute capability"], row["dtype"], row["memory format"])
            kinds.setdefault(kind, []).append(row)
    return frozenset(kind for kind, members in kinds.items() if _is_faster(members))


def _is_faster(members: list[dict[str, Any]]) -> bool:
    ours = sum(row["calls"] * row["microseconds"] for row in members)
    theirs = sum(row["calls"] * row["microseconds"] * row["ratio"] for row in members)
    return theirs > ours and all(row["ratio"] >= SLOWEST for row in members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10-128", metavar="NAME", help="a preset or packaged model (%(default)s)")
    parser.add_argument("--batch", type=int, default=512, metavar="N", help="images (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the images (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = []
    with torch.no_grad():
        model: nn.Module = network(arguments.model)
        for row in rows(model, arguments.batch, getattr(torch, arguments.dtype)):
            found.append(row)
            what = f"{row['operator']} {row.get('with', row['shape'])}"
            print(f"{what}: {row['microseconds']} us, {row['ratio']} x, {row['calls']} times", flush=True)
    if arguments.out:
        lines = ",\n".join(json.dumps(row) for row in found)
        arguments.out.write_text(f'{{"machine": {json.dumps(machine())},\n"rows": [\n{lines}\n]}}\n')
    print("\nFor FASTER_ON_GPU in ddim_fast/ops/measured.py:")
    for kind in sorted(faster(found)):
        print(f"        {kind!r},")


if __name__ == "__main__":
    main()
