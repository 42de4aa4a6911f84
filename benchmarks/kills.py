"""Kill small jobs at random, go on, and look whether their result is that of a job that nobody has killed.

    python benchmarks/kills.py [--share 0.1] [--only NAME ...] [--out FILE.json]

A job is killed again and again, half of the times after a random time, half of the times at a random operation on files, and
goes on by the same command until it is finished. Then its files are compared, byte by byte, with those of the undisturbed job:
weights, optimizer state and sample grids, or images. Pairs of jobs begin at the same time on one output, and one must be
refused. Jobs are forked from this process, which has loaded everything; two processes of a training get the environment that
torchrun gives them, and the end that it gives the one that is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine
from PIL import Image

from ddim_fast import sample, train
from ddim_fast.cli.parser import run_command

STEPS = 8
NETWORK = ["sample_size=8", "base_channels=8", "channel_multipliers=[1,2]", "layers_per_block=1", "norm_num_groups=4"]
TRAIN = ["--preset=grey-32", "--set", *NETWORK, "attention_resolutions=[4]", f"--steps={STEPS}", "--batch-size=4", "--warmup=0"]
TRAIN += [
    "--lr=1e-3",
    "--dropout=0",
    "--device=cpu",
    "--dtype=float32",
    "--log-every=2",
    "--save-every=2",
    "--sample-every=4",
    "--quiet",
]
SAMPLE = ["--num-images=24", "--batch-size=2", "--steps=2", "--device=cpu", "--quiet"]

# What is counted to find a moment amid the writing.
OPERATIONS = ("fsync", "link", "mkdir", "replace", "rmdir", "unlink")
PATIENCE = 600.0  # seconds until a process counts as hanging
GRACE = 1.0, 30.0  # torchrun's, to a process that is left: until SIGTERM, and until SIGKILL after it


@dataclass(frozen=True)
class Case:
    """Jobs of one command in ``processes`` processes, which get ``number`` ``kills`` times in all."""

    command: Any
    processes: int
    number: signal.Signals
    kills: int


CASES = {
    "train-sigkill": Case(train, 1, signal.SIGKILL, 200),
    "train-sigterm": Case(train, 1, signal.SIGTERM, 100),
    "train-2-sigkill": Case(train, 2, signal.SIGKILL, 50),
    "train-2-sigterm": Case(train, 2, signal.SIGTERM, 25),
    "sample-sigkill": Case(sample, 1, signal.SIGKILL, 200),
}
PAIRS = {"sample-pairs": 100}


@dataclass
class Findings:
    """What happened in a case, and what should not have."""

    kills: int = 0
    jobs: int = 0
    exit_codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Jobs:
    """Forks jobs.

    Args:
        folder: where they write.
        options: of each command, but for --out.
    """

    def __init__(self, folder: Path, options: dict[Any, list[str]]) -> None:
        self.folder, self.options = folder, options

    def arguments(self, command: Any, out: Path) -> list[str]:
        """Of the command, which goes on where there is something to go on from."""
        return [command.__name__, *self.options[command], "--out", str(out), *(["--resume=auto"] if command is train else [])]

    def here(self, command: Any, out: Path) -> int:
        """Run a command in this process; returns its exit code."""
        sys.argv = self.arguments(command, out)
        try:
            run_command(command.main)
        except SystemExit as stop:
            return int(stop.code or 0)

    def begin(self, command: Any, out: Path, environment: dict[str, str], prepare: Callable[[], None]) -> int:
        """Begin a job in a process of its own, which calls ``prepare`` first; returns its number."""
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.environ.update(environment)
                told = os.open(self.folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(told, 1), os.dup2(told, 2)
                prepare()
                code = self.here(command, out)
            finally:
                os._exit(code)
        return child

    def told(self) -> str:
        """What the jobs have said since the last call."""
        path = self.folder / "told"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text


def at_operation(moment: int, number: signal.Signals) -> None:
    """Have this process get the signal before its operation ``moment`` on files."""
    left = moment

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
            return operation(*arguments, **options)

        return count

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


def ended(process: int, seconds: float) -> int | None:
    """The exit code of a process, of one that a signal has ended minus its number; None where it goes on for so long."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def end_of_all(processes: list[int]) -> list[int | None]:
    """The exit codes, None of those that had to be killed. A process that is left is ended as torchrun does it."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(processes) and not any(codes.values()) and time.monotonic() < deadline:
        codes |= {p: code for p in processes if p not in codes and (code := ended(p, 0)) is not None}
        time.sleep(0.002)
    for process in processes:
        for patience, number in zip(GRACE, (signal.SIGTERM, signal.SIGKILL), strict=True):
            if process not in codes and (code := ended(process, patience)) is not None:
                codes[process] = code
            if process not in codes:
                os.kill(process, number)
        if process not in codes:
            ended(process, PATIENCE)
            codes[process] = None
    return [codes[process] for process in processes]


def life(jobs: Jobs, case: Case, out: Path, moment: float | int, victims: list[int]) -> list[int | None]:
    """One attempt at a job, of which some processes get a signal; returns the exit codes.

    Args:
        moment: an operation on files of the first process, as int, or a time in seconds.
        victims: the ranks that get the signal after a time.
    """
    environments: list[dict[str, str]] = [{}]
    if case.processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environments = [{**common, "RANK": str(k), "LOCAL_RANK": str(k)} for k in range(case.processes)]
    by_operation = isinstance(moment, int)
    processes = []
    for rank, environment in enumerate(environments):
        chosen = by_operation and rank == 0
        prepare = (lambda: at_operation(int(moment), case.number)) if chosen else (lambda: None)
        processes.append(jobs.begin(case.command, out, environment, prepare))
    if not by_operation:
        time.sleep(moment)
        for rank in victims:
            os.kill(processes[rank], case.number)
    return end_of_all(processes)


def differences(found: Any, whole: Any, name: str = "") -> list[str]:
    """Where two training states differ."""
    if isinstance(whole, dict):
        if found.keys() != whole.keys():
            return [f"{name}: other keys"]
        return [line for key in whole for line in differences(found[key], whole[key], f"{name}/{key}")]
    same = torch.equal(found, whole) if isinstance(whole, torch.Tensor) else found == whole
    return [] if same else [name]


def compare(out: Path, whole: Path, findings: Findings) -> None:
    """Compare the result of a job with that of the undisturbed one."""

    def fault(what: str) -> None:
        findings.faults.append(f"{out.name}: {what}")

    if whole.is_file():
        if out.read_bytes() != whole.read_bytes():
            fault("other images")
        return
    mine, theirs = ({str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (out, whole))
    for name in sorted(mine ^ theirs):
        steps, _, file = name.removeprefix("checkpoints/").partition("/")
        is_of_other_step = name.startswith("checkpoints/") and steps.isdecimal() and not file.startswith(".")
        if not is_of_other_step:
            fault(f"{name} is {'stray' if name in mine else 'missing'}")
    same = [*theirs & {"config.json", "model.safetensors"}, *(name for name in theirs if name.startswith("samples/"))]
    for name in sorted(mine.intersection(same)):
        if (out / name).read_bytes() != (whole / name).read_bytes():
            fault(f"{name} is another one")
    states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in (out, whole)]
    for place in differences(*states):
        fault(f"training_state.pt differs in {place}")
    steps = [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()]
    if steps != sorted(set(steps)) or steps[-1] != STEPS:
        fault(f"stats.jsonl has the steps {steps}")


def kill(jobs: Jobs, name: str, count: int, generator: random.Random) -> Iterator[Findings]:
    """Kill jobs of a case ``count`` times, and compare each that got finished; yields what was found so far after each."""
    case, findings = CASES[name], Findings()
    suffix = ".npz" if case.command is sample else ""
    whole = jobs.folder / f"{name}-whole{suffix}"
    begin = time.monotonic()
    codes = life(jobs, case, whole, 10**9, [])
    length = time.monotonic() - begin
    if any(codes):
        raise RuntimeError(f"{name}: the undisturbed job ended with {codes}: {jobs.told()}")
    allowed = {0, 1, -case.number, 128 + case.number, -signal.SIGTERM, 128 + signal.SIGTERM}
    if case.processes == 1:
        allowed = {0, -case.number, 128 + case.number}
    while findings.kills < count:
        out = jobs.folder / f"{name}-{findings.jobs}{suffix}"
        is_finished = False
        while not is_finished:
            by_time = generator.random() < 0.5 or findings.kills >= count
            moment: float | int = generator.uniform(0, length) if by_time else generator.randrange(1, 60)
            ranks = list(range(case.processes))
            victims = [] if findings.kills >= count else generator.choice([ranks, *([rank] for rank in ranks)])
            codes = life(jobs, case, out, moment, victims)
            is_finished = not any(codes)
            findings.kills += any(codes)
            findings.exit_codes[str(codes)] += 1
            told = jobs.told()
            if None in codes or not set(codes) <= allowed or "Traceback" in told:
                findings.faults.append(f"{out.name}: exit codes {codes}: {told[-2000:]}")
                if findings.kills > 2 * count:
                    yield findings
                    return
        compare(out, whole, findings)
        findings.jobs += 1
        yield findings
    names = {path.name.removesuffix(suffix) for path in jobs.folder.glob(f"*{name}-*")}
    for stray in sorted(names - {f"{name}-whole", *(f"{name}-{k}" for k in range(findings.jobs))}):
        findings.faults.append(f"{stray} is stray")
    yield findings


def pair(jobs: Jobs, name: str, count: int) -> Iterator[Findings]:
    """Begin two jobs on one output, ``count`` times; yields what was found so far after each time."""
    findings, whole = Findings(), jobs.folder / f"{name}-whole.npz"
    if jobs.here(sample, whole):
        raise RuntimeError("the undisturbed job failed")
    for number in range(count):
        out = jobs.folder / f"{name}-{number}.npz"
        codes = [ended(p, PATIENCE) for p in [jobs.begin(sample, out, {}, lambda: None) for _ in range(2)]]
        findings.exit_codes[str(codes)] += 1
        told = jobs.told()
        if 0 not in codes or not set(codes) <= {0, 1, 2} or (1 in codes and "is being written by process" not in told):
            findings.faults.append(f"{out.name}: exit codes {codes}: {told[-2000:]}")
        compare(out, whole, findings)
        findings.jobs += 1
        yield findings
    names = {path.name for path in jobs.folder.glob(f"*{name}-*")}
    for stray in sorted(names - {whole.name, *(f"{name}-{k}.npz" for k in range(count))}):
        findings.faults.append(f"{stray} is stray")
    yield findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", metavar="X", type=float, default=1.0, help="of the kills and pairs (default: all)")
    parser.add_argument("--only", metavar="NAME", nargs="+", choices=[*CASES, *PAIRS], help=", ".join([*CASES, *PAIRS]))
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the moments")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the results to this JSON file")
    args = parser.parse_args()
    # A process that has started other threads must not be forked.
    torch.set_num_threads(1)
    names = args.only or [*CASES, *PAIRS]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photos").mkdir()
        for k, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)):
            Image.fromarray(pixels).save(folder / "photos" / f"{k}.png")
        model = folder / "model"
        options = {train: [f"--data={folder / 'photos'}", *TRAIN], sample: [f"--model={model}", *SAMPLE]}
        jobs = Jobs(folder, options)
        # What is imported at first use is imported once, here.
        if jobs.here(train, model) or jobs.here(sample, folder / "first.npz"):
            return 1
        for name in names:
            begin, generator = time.monotonic(), random.Random(f"{args.seed} {name}")
            count = max(1, round(args.share * (PAIRS[name] if name in PAIRS else CASES[name].kills)))
            for findings in pair(jobs, name, count) if name in PAIRS else kill(jobs, name, count, generator):
                results[name] = {**vars(findings), "seconds": round(time.monotonic() - begin)}
                if args.out is not None:  # after each job, as this takes long
                    args.out.write_text(json.dumps({"machine": machine(), "cases": results}, indent=2) + "\n")
            print(json.dumps({name: results[name]}), flush=True)
    return 1 if any(result["faults"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
