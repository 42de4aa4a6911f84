"""Gives a reader of files thousands of damaged ones: each must be read, or refused as a user's mistake is.

A module of this folder has a :class:`Fuzzer` a reader. pytest runs a few hundred inputs of each; more are run by hand::

    python -m tests.fuzz.test_config --count 20000 --seed 0
    python -m tests.fuzz.test_config --first 1234 --count 1     # input 1234 again
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
MEMORY = 2 * 2**30  # bytes, above what the process has already


@dataclass
class Outcome:
    """What became of the inputs.

    Attributes:
        read: how many were read.
        refused: how many were refused as they should be.
        faults: what happened to each of the others, by the input's number: a line, and the traceback.
        slowest: seconds of processor time that the slowest input took.
    """

    read: int = 0
    refused: int = 0
    faults: dict[int, str] = field(default_factory=dict)
    slowest: float = 0.0


@dataclass(frozen=True)
class Fuzzer:
    """A reader and how its files are damaged.

    Attributes:
        name: of what is read.
        write: writes valid files into an empty folder and returns those to be damaged; the others stay as they are.
        read: given one of these files, reads it, or the folder that it lies in. It may assert what must hold of the result.
        mutate: makes a damaged file of a valid one's bytes. Its random generator is the input's own: input i is the same
            whatever ran before it.
    """

    name: str
    write: Callable[[Path], Sequence[Path]]
    read: Callable[[Path], object]
    mutate: Callable[[Random, bytes], bytes]

    def run(
        self, count: int, seed: int = 0, first: int = 0, progress: Callable[[int], object] = lambda number: None
    ) -> Outcome:
        """The outcome of the inputs ``first`` to ``first + count - 1``."""
        outcome = Outcome()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            valid = {path: path.read_bytes() for path in self.write(Path(folder))}
            names = {path.name for path in Path(folder).rglob("*")}
            for path in valid:
                self.read(path)  # what is not read undamaged tests nothing
            for number in range(first, first + count):
                random = Random(f"{seed}/{number}")
                path = random.choice(list(valid))
                path.write_bytes(self.mutate(random, valid[path]))
                self._try(path, number, names, outcome)
                path.write_bytes(valid[path])
                if progress is not None:
                    progress(number)
        return outcome

    def check(self, count: int) -> None:
        """A short run, in which some inputs must be read, some refused, and none be a fault."""
        outcome = self.run(count)
        assert not outcome.faults, "\n".join(f"input {number}: {why}" for number, why in outcome.faults.items())
        assert outcome.read and outcome.refused, outcome

    def _try(self, path: Path, number: int, names: set[str], outcome: Outcome) -> None:
        start = time.process_time()
        try:
            with _limits():
                self.read(path)
            outcome.read += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            fault = _fault(error, names)
            if fault is None:
                outcome.refused += 1
            else:
                outcome.faults[number] = (
                    f"{path.name}: {fault} at {_place(error)}\n{''.join(traceback.format_exception(error))}"
                )
        seconds = time.process_time() - start
        outcome.slowest = max(outcome.slowest, seconds)
        if seconds > SECONDS:  # in a library, which the timer does not interrupt
            outcome.faults.setdefault(number, f"{path.name}: took {seconds:.0f} s")


def _fault(error: BaseException, names: set[str]) -> str | None:
    """What is wrong with an error; None where it is one that a user's mistake should have."""
    message = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
            return f"more than {MEMORY / 2**30:.0f} GB ({cause})"
        cause = cause.__cause__ or cause.__context__
    if type(error) not in (ValueError, FileNotFoundError):
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
    """Inside, what takes longer than SECONDS is interrupted, and more memory than MEMORY cannot be had."""

    def interrupt(number: int, frame: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    with _memory_limit():
        before = signal.signal(signal.SIGPROF, interrupt)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(data.split()[1]) + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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
                f"{len(outcome.faults)} faults, the slowest took {outcome.slowest:.2f} s",
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
