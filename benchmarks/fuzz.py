"""Give every reader of files thousands of damaged ones, and count what was read, what was refused, and what was a fault.

    python benchmarks/fuzz.py [--count 20000] [--only READER ...] [--out FILE.json]

The readers are those of tests/fuzz, as pictures/PNG; its operators, which are called with hostile tensors, count as such.
tests/helpers/fuzzing.py says what a fault is: an error that is not the package's own, more than 10 seconds, more than 2 GB,
the end of the process. All readers take hours. The command goes on from FILE.json: readers that it holds as many inputs of,
without faults, are left out. `python -m tests.fuzz.test_pictures --only PNG --first 7065 --count 1` shows the traceback of
one input's fault.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import machine

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.fuzzing import Fuzzer  # noqa: E402


def readers() -> dict[str, Fuzzer]:
    """The fuzzers of the modules of tests/fuzz, by module and name."""
    found = {}
    for path in sorted((ROOT / "tests" / "fuzz").glob("test_*.py")):
        for value in vars(importlib.import_module(f"tests.fuzz.{path.stem}")).values():
            for fuzzer in value if isinstance(value, tuple) else (value,):
                if isinstance(fuzzer, Fuzzer):
                    found[f"{path.stem.removeprefix('test_')}/{fuzzer.name}"] = fuzzer
    return found


def try_inputs(fuzzer: Fuzzer, count: int) -> dict[str, Any]:
    """What became of the first ``count`` inputs of a reader."""
    begin, outcome = time.monotonic(), fuzzer.run(count)
    return {
        "inputs": count,
        "read": outcome.read,
        "refused": outcome.refused,
        "faults": {number: why.splitlines()[0] for number, why in outcome.faults.items()},
        "slowest_seconds": round(outcome.slowest, 2),
        "largest_megabytes": round(outcome.largest / 1e6),
        "seconds": round(time.monotonic() - begin),
    }


def main() -> int:
    fuzzers = readers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", metavar="N", type=int, default=20_000, help="inputs a reader (default: 20000)")
    parser.add_argument("--only", metavar="READER", nargs="+", choices=fuzzers, help=", ".join(fuzzers))
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if args.out is not None and args.out.exists():
        results = json.loads(args.out.read_text())["readers"]
    for name in args.only or fuzzers:
        if name in results and results[name]["inputs"] >= args.count and not results[name]["faults"]:
            continue
        results[name] = try_inputs(fuzzers[name], args.count)
        print(json.dumps({name: results[name]}), flush=True)
        if args.out is not None:  # after each reader, as this takes long
            rows = dict(sorted(results.items()))
            args.out.write_text(json.dumps({"machine": machine(), "readers": rows}, indent=2) + "\n")
    return 1 if any(result["faults"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
