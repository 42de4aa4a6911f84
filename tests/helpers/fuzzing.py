"""Gives a reader of files thousands of damaged ones: each must be read, or refused as a user's mistake is.

A module of tests/fuzz has a :class:`Fuzzer` a reader. pytest runs some inputs of each; more are run by hand::

    python -m tests.fuzz.test_config --count 20000 --seed 0
    python -m tests.fuzz.test_config --first 1234 --count 1     # input 1234 again

The inputs are read in a child process of limited memory and time. Where one ends that process, it is a fault, and another
process goes on after it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["Fuzzer", "Outcome", "main", "mutate_bytes", "mutate_json"]

SECONDS = 10  # of processor time, an input
MEMORY = 2 * 2**30  # bytes of address space, above what the process has already
PATIENCE = 120  # seconds, an input: it waits for something that does not come

_LINUX = sys.platform == "linux"


@dataclass
class Outcome:
    """What became of the inputs.

    Attributes:
        read: how many were read.
        refused: how many were refused as they should be.
        faults: what happened to each of the others, by the input's number: a line, and the traceback where there is one.
        slowest: seconds of processor time that the slowest input took.
        largest: bytes of memory that one input took at most.
    """

    read: int = 0
    refused: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0
    largest: int = 0


@dataclass(frozen=True)
class Fuzzer:
    """A reader and how its files are damaged.

    Attributes:
        name: of what is read.
        write: writes valid files into an empty folder and returns those to be damaged; the others stay as they are.
        read: given one of these files, reads it, or the folder that it lies in. It may assert what must hold of the result.
        mutate: makes a damaged file of a valid one's bytes. Its random generator is the input's own: input i is the same
            whatever ran before it.
        refusals: kinds of errors of one line that are a refusal, beside ValueError and FileNotFoundError.
        names_file: whether a refusal must name one of the files or folders.
    """

    name: str
    write: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], object]
    mutate: Callable[[Random, bytes], bytes]
    refusals: tuple[type[Exception], ...] = ()
    names_file: bool = True

    def run(
        self, count: int, seed: int = 0, first: int = 0, progress: Callable[[int], object] = lambda number: None
    ) -> Outcome:
        """The outcome of the inputs ``first`` to ``first + count - 1``."""
        outcome, end = Outcome(), first + count
        while first < end:
            with tempfile.TemporaryDirectory() as folder:
                first = self._run_child(Path(folder), seed, range(first, end), outcome, progress)
        return outcome

    def check(self, count: int) -> None:
        """A short run, in which some inputs must be read, some refused, and none be a fault."""
        outcome = self.run(count)
        assert not outcome.faults, "\n".join(f"input {number}: {why}" for number, why in outcome.faults.items())
        assert outcome.read and outcome.refused, outcome

    def _run_child(self, folder: Path, seed: int, numbers: range, outcome: Outcome, progress: Callable[[int], object]) -> int:
        """Have a process try the inputs; returns the number of the first one that is left, for it may end early."""
        reports, reported = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: torch has threads, which wait
            child = os.fork()
        if child == 0:
            try:
                os.close(reports)
                with os.fdopen(reported, "w") as file:
                    self._try_all(folder, seed, numbers, file)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(reported)
        number, begun = numbers.start, False
        with os.fdopen(reports) as file:
            for line in file:
                if begun:
                    _note(outcome, number, *json.loads(line))
                    progress(number)
                    number += 1
                begun = True
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not begun:
            raise RuntimeError(f"{self.name}: what is not damaged cannot be written or read (exit status {status})")
        if number < numbers.stop:
            _note(outcome, number, _ENDS.get(-status, f"the process ended with {_status(status)}"), math.nan, 0)
            number += 1
        return number

    def _try_all(self, folder: Path, seed: int, numbers: range, reports: Any) -> None:
        """Report on each input in a line; the first line says that the valid files are there and are read."""
        warnings.simplefilter("ignore")
        faulthandler.disable()
        for number in (signal.SIGALRM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.environ["XDG_CACHE_HOME"] = str(folder / ".cache")
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # those of the parent are not here
        valid = {path: path.read_bytes() for path in self.write(folder)}
        names = {path.name for path in folder.rglob("*")}
        for path in valid:
            self.read(path)  # what is not read undamaged tests nothing
        print("begun", file=reports, flush=True)
        for number in numbers:
            random = Random(f"{seed}/{number}")
            path = random.choice(list(valid))
            path.write_bytes(self.mutate(random, valid[path]))
            print(json.dumps(self._try(path, names)), file=reports, flush=True)
            path.write_bytes(valid[path])

    def _try(self, path: Path, names: set[str]) -> tuple[str, float, int]:
        """What became of a damaged file, its seconds of processor time, and the bytes of memory that it took."""
        what, start = "read", time.process_time()
        with _peak_memory() as memory:
            try:
                with _limits():
                    self.read(path)
            except BaseException as error:  # a panic of a Rust library is no Exception
                fault = _fault(error, names if self.names_file else {""}, self.refusals)
                trace = "".join(traceback.format_exception(error))
                what = "refused" if fault is None else f"{path.name}: {fault} at {_place(error)}\n{trace}"
        seconds = time.process_time() - start
        if seconds > SECONDS and what in ("read", "refused"):  # in a library, which the timer does not interrupt
            what = f"{path.name}: took {seconds:.0f} s"
        return what, seconds, memory[0]


def _note(outcome: Outcome, number: int, what: str, seconds: float, memory: int) -> None:
    if what in ("read", "refused"):
        setattr(outcome, what, getattr(outcome, what) + 1)
    else:
        outcome.faults[number] = what
    outcome.slowest, outcome.largest = max(outcome.slowest, seconds), max(outcome.largest, memory)


# What the limits of the system do to a process.
_ENDS = {
    signal.SIGXCPU: f"more than {SECONDS} s of processor time, in a library",
    signal.SIGALRM: f"waits for more than {PATIENCE} s",
}


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _fault(error: BaseException, names: set[str], refusals: tuple[type[Exception], ...]) -> str | None:
    """What is wrong with an error; None where it is one that a user's mistake should have."""
    message = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"more than {MEMORY / 2**30:.0f} GB ({cause})"
        cause = cause.__cause__ or cause.__context__
    if type(error) not in (ValueError, FileNotFoundError, *refusals):
        return f"{type(error).__name__}: {message.partition(chr(10))[0]}"
    if len(message.splitlines()) != 1:
        return f"an error of {len(message.splitlines())} lines: {message!r}"
    if " object at 0x" in message:
        return f"an error that names an object in memory: {message}"
    if not any(name in message for name in names):
        return f"an error that names no file: {message}"
    return None


def _place(error: BaseException) -> str:
    """The last line of this project's that an error has passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)]
    return "{0.filename}:{0.lineno}".format((ours or frames)[-1])


_ROOT = Path(__file__).parents[2] / "ddim_fast"


class Hang(BaseException):
    """The input took too long. No Exception: readers turn many of those into errors of their own."""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Inside, what takes longer than SECONDS is interrupted, or where Python does not come to that, ends the process; and more
    memory than MEMORY cannot be had."""
    import resource

    def interrupt(number: int, frame: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    spent, before = math.ceil(time.process_time() + SECONDS), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1, resource.RLIM_INFINITY))
    if _LINUX:
        resource.setrlimit(resource.RLIMIT_AS, (_of_process("VmSize") + MEMORY, before[1]))
    signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yields a list that afterwards holds the bytes of memory that were taken inside, at most."""
    peak = [0]
    if not _LINUX:
        yield peak
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _of_process("VmRSS")
    yield peak
    peak[0] = _of_process("VmHWM") - before


def _of_process(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """A few changes of any file: flipped bits, bytes that are cut off, cut out, doubled or overwritten, large numbers."""
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(data) + 1)
        size = random.choice((1, 2, 4, 8, random.randrange(1, 64), random.randrange(1, len(data) + 2)))
        part, rest = data[at : at + size], data[at + size :]
        change = random.randrange(8)
        if change <= 2 and part:
            flipped = bytearray(data)
            flipped[at] ^= 1 << random.randrange(8)
            data = bytes(flipped)
        elif change == 3:
            data = data[:at]
        elif change == 4:
            data = data[:at] + rest
        elif change == 5:
            data = data[:at] + part + part + rest
        elif change == 6:
            data = data[:at] + random.choice((bytes(len(part)), b"\xff" * len(part), random.randbytes(len(part)))) + rest
        else:
            length, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            large = random.choice((0, 1, 2 ** (8 * length) - 1, 2 ** (8 * length - 1) - 1, 2 ** random.randrange(8 * length)))
            data = data[:at] + large.to_bytes(length, order) + data[at + length :]
    return data


def mutate_json(random: Random, data: bytes) -> bytes:
    """The same JSON with a few values, keys or types changed; at times its bytes are changed instead."""
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    document = json.loads(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        document = _mutate_value(random, document)
    return json.dumps(document).encode()


def _mutate_value(random: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.95:
        key = random.choice(list(value))
        change = random.randrange(10)
        if change == 0:
            return {k: v for k, v in value.items() if k != key}
        if change == 1:
            return {**value, _TEXTS[random.randrange(len(_TEXTS))]: value[key]}
        if change == 2:
            return {(k + "x" if k == key else k): v for k, v in value.items()}
        if change == 3:
            return {**value, key: value[random.choice(list(value))]}
        return {**value, key: _mutate_value(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.7:
        at = random.randrange(len(value))
        change = random.randrange(4)
        if change == 0:
            return value[:at] + value[at + 1 :]
        if change == 1:
            return value[:at] + [value[at]] * random.choice((2, 3, 1000)) + value[at + 1 :]
        return [*value[:at], _mutate_value(random, value[at]), *value[at + 1 :]]
    if type(value) in (int, float) and abs(value) < 1e300 and random.random() < 0.5:
        return random.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 1000, float(value), str(value)))
    return random.choice(
        (
            None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**31 - 1, 2**63, 2**64 - 1, 10**12, 10**400,
            float("nan"), float("inf"), -float("inf"), [], {}, [value], {"a": value}, [[[[]]]], *_TEXTS,
        )
    )  # fmt: skip


_TEXTS = ("", "x", "1", "null", "../x", "/", "\0", "a\nb", "\ud800", "é" * 300, "%s{}", "__class__", "self")


def main(*fuzzers: Fuzzer) -> None:
    """The command line of a module: runs its fuzzers and says what became of the inputs."""
    parser = argparse.ArgumentParser(description="Give readers damaged files.")
    parser.add_argument("--count", type=int, default=20_000, help="inputs a reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", choices=[fuzzer.name for fuzzer in fuzzers], help="one reader")
    arguments = parser.parse_args()
    found = False
    for fuzzer in fuzzers:
        if arguments.only in (None, fuzzer.name):
            outcome = fuzzer.run(arguments.count, arguments.seed, arguments.first, _show)
            for numbers in _alike(outcome.faults):
                print(f"{fuzzer.name}, input {numbers[0]} and {len(numbers) - 1} alike: {outcome.faults[numbers[0]]}")
            print(
                f"{fuzzer.name}: {arguments.count} inputs, {outcome.read} read, {outcome.refused} refused, "
                f"{len(outcome.faults)} faults, the slowest took {outcome.slowest:.2f} s, the largest "
                f"{outcome.largest / 1e6:.0f} MB",
                flush=True,
            )
            found |= bool(outcome.faults)
    sys.exit(found)


def _alike(faults: dict[int, str]) -> list[list[int]]:
    """The numbers of faults, those of one place together."""
    places: dict[str, list[int]] = {}
    for number, why in faults.items():
        places.setdefault(why.splitlines()[0].rpartition(" at ")[2], []).append(number)
    return list(places.values())


def _show(number: int) -> None:
    if number % 1000 == 999:
        print(f"{number + 1} ...", file=sys.stderr, flush=True)
