"""Train, sample and serve again and again, and look whether memory, open files or temporary files grow, or answers change.

    python benchmarks/soak.py [--minutes 60] [--out FILE.json]

Each round trains a small network, samples from it, and asks a server of examples/onnx_server for images. All bytes must be
those of the first round. Memory and open files are those of this process, which trains and samples, and of the server. Exit
code 1 says that an answer was wrong or that files were left; whether memory grows is for the reader of the rows to judge.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from kills import SAMPLE, TRAIN
from measure import machine
from PIL import Image

from ddim_fast import export, sample, train
from ddim_fast.cli.parser import run_command

SERVER = Path(__file__).parents[1] / "examples" / "onnx_server" / "server.py"
REQUESTS = 20  # a round
ROWS = 60  # in the result


def run(command: Any, *arguments: object) -> None:
    """Run a command in this process.

    Raises:
        RuntimeError: it fails.
    """
    sys.argv = [command.__name__, *map(str, arguments)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_command(command.main)
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{' '.join(sys.argv)}: exit code {stop.code}: {said.getvalue()}") from None


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[int, str]]:
    """The number of a server's process, and its address."""
    command = [sys.executable, str(SERVER), "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            yield server.pid, line.partition(" listening at ")[2].split()[0]
        finally:
            server.terminate()


def ask(address: str, seeds: list[int]) -> bytes:
    """The answer to a request."""
    body = json.dumps({"seeds": seeds}).encode()
    request = urllib.request.Request(f"{address}/images", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return answer.read()


def state_of(process: int | str) -> dict[str, int]:
    """Resident memory in KiB, open files and threads of a process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {
        "rss_kib": int(fields["VmRSS"].split()[0]),
        "open_files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(fields["Threads"]),
    }


def heap_in_use() -> int:
    """Bytes that this process has allocated and not freed: what grows by a leak, but not by fragments."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallInfo2
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


class _MallInfo2(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    )


def digest_of(results: list[Path]) -> dict[str, str]:
    """Of the files that are to be the same each time, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in results}


def soak(folder: Path, minutes: float) -> Iterator[dict[str, Any]]:
    """Work in ``folder``; yields a row a round."""
    (folder / "photos").mkdir()
    for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "photos" / f"{k}.png")
    model, run_folder, images = folder / "model", folder / "run", folder / "images.npz"
    run(train, f"--data={folder / 'photos'}", *TRAIN, "--out", model)
    run(export, "--to", "plan", "--model", model, "--steps", 4, "--out", folder / "plan")
    with serving(folder / "plan") as (server, address):
        answers = {k: ask(address, [k]) for k in range(REQUESTS)}
        begin, first = time.monotonic(), None
        while first is None or time.monotonic() - begin < 60 * minutes:
            run(train, f"--data={folder / 'photos'}", *TRAIN, "--out", run_folder)
            run(sample, f"--model={model}", *SAMPLE, "--out", images)
            found = digest_of([images, *(run_folder / name for name in ("model.safetensors", "training_state.pt"))])
            first = first or found
            shutil.rmtree(run_folder)
            images.unlink()
            wrong = sum(found[name] != first[name] for name in first)
            wrong += sum(ask(address, [k]) != answer for k, answer in answers.items())
            yield {
                "seconds": round(time.monotonic() - begin),
                "wrong": wrong,
                "files": len(list(folder.rglob("*"))),
                "own": state_of("self") | {"objects": len(gc.get_objects()), "heap_kib": heap_in_use() // 1024},
                "server": state_of(server),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", metavar="M", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the rows to this JSON file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TMPDIR"] = tempfile.tempdir = temporary  # so that temporary files are counted, the server's, too
        for row in soak(Path(temporary), args.minutes):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out is not None:
                shown = rows[:: -(-len(rows) // ROWS)]
                totals = {"rounds": len(rows), "requests": REQUESTS * (len(rows) + 1), "wrong": sum(r["wrong"] for r in rows)}
                args.out.write_text(json.dumps({"machine": machine(), **totals, "rows": shown}, indent=2) + "\n")
    return int(any(row["wrong"] for row in rows) or rows[-1]["files"] > rows[0]["files"])


if __name__ == "__main__":
    sys.exit(main())
