"""The driver itself: what it takes for a fault."""

import os
import signal

import pytest
import torch

from tests.helpers import fuzzing
from tests.helpers.fuzzing import Fuzzer, mutate_bytes, mutate_json


def write(folder):
    (folder / "a.bin").write_bytes(b"valid")
    return [folder / "a.bin"]


def reader(fail):
    """One that fails in this way where the file is not the valid one."""
    return lambda path: path.read_bytes() == b"valid" or fail(path)


def refuse(path, message="{}: not valid", kind=ValueError):
    raise kind(message.format(path))


def swallow(path):
    try:
        torch.empty(3 * 2**28)
    except Exception:
        raise ValueError(f"{path}: not valid") from None


def hang(path):
    while True:
        pass


def change(random, data):
    return b"changed" if random.random() < 0.5 else data


def test_a_refusal_of_one_line_with_the_files_name_is_no_fault():
    outcome = Fuzzer("name", write, reader(refuse), change).run(20)
    assert outcome.read and outcome.refused and outcome.read + outcome.refused == 20 and not outcome.faults


@pytest.mark.parametrize(
    "fail,why",
    [
        (lambda path: refuse(path, kind=TypeError), "TypeError"),
        (lambda path: refuse(path, kind=SystemExit), "SystemExit"),
        (lambda path: refuse(path, "not valid"), "names no file"),
        (lambda path: refuse(path, "{}: not\nvalid"), "2 lines"),
        (lambda path: torch.empty(3 * 2**28), "more than 2 GB"),
        (swallow, "more than 2 GB"),
        (hang, "more than 0.05 s"),
    ],
)
def test_anything_else_is_a_fault(fail, why, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    outcome = Fuzzer("name", write, reader(fail), lambda random, data: b"changed").run(1)
    assert not outcome.read and not outcome.refused and why in outcome.faults[0].splitlines()[0]


def test_what_ends_the_process_is_a_fault_and_the_inputs_after_it_are_tried():
    def read(path):
        if path.read_bytes() == b"changed":
            os.kill(os.getpid(), signal.SIGSEGV)

    outcome = Fuzzer("name", write, read, change).run(8)
    assert outcome.faults and outcome.read + len(outcome.faults) == 8
    assert set(outcome.faults.values()) == {"the process ended with SIGSEGV"}


def test_what_python_cannot_interrupt_is_a_fault(monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)

    def read(path):
        if path.read_bytes() == b"changed":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])  # as in a library that does not return
            hang(path)

    outcome = Fuzzer("name", write, read, lambda random, data: b"changed").run(1)
    assert "of processor time" in outcome.faults[0]


def test_a_reader_that_refuses_the_valid_file_tests_nothing():
    with pytest.raises(RuntimeError, match="name: what is not damaged cannot be written or read"):
        Fuzzer("name", write, refuse, change).run(1)


@pytest.mark.parametrize("mutate,data", [(mutate_bytes, bytes(range(50))), (mutate_json, b'{"a": [1, 2.0], "b": "c"}')])
def test_an_input_is_the_same_whatever_ran_before_it(mutate, data, tmp_path):
    seen = tmp_path / "seen"

    def write(folder):
        (folder / "a.bin").write_bytes(data)
        return [folder / "a.bin"]

    def read(path):
        with open(seen, "a") as file:
            file.write(f"{path.read_bytes()!r}\n")

    fuzzer = Fuzzer("name", write, read, mutate)
    fuzzer.run(20)
    fuzzer.run(5, first=15)
    lines = seen.read_text().splitlines()
    assert lines[-5:] == lines[16:21] and len(set(lines)) > 10
