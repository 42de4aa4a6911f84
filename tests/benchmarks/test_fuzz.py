"""The script that gives readers damaged files notes what became of them, and goes on where it was."""

import json
import sys

import fuzz

from tests.helpers.fuzzing import Fuzzer


def write(folder):
    (folder / "a.bin").write_bytes(b"valid")
    return [folder / "a.bin"]


def reader(error):
    """One that takes nothing but the valid file."""

    def read(path):
        if path.read_bytes() != b"valid":
            raise error(f"{path}: not valid")

    return Fuzzer("name", write, read, lambda random, data: b"changed")


def test_a_reader_is_tried_again_after_faults_and_for_more_inputs(tmp_path, monkeypatch):
    out = tmp_path / "fuzz.json"

    def run(count, **readers):
        monkeypatch.setattr(fuzz, "readers", lambda: readers)
        monkeypatch.setattr(sys, "argv", ["fuzz.py", "--count", str(count), "--out", str(out)])
        code = fuzz.main()
        found = json.loads(out.read_text())["readers"]
        return code, {name: (row["inputs"], row["refused"], len(row["faults"])) for name, row in found.items()}

    assert run(3, good=reader(ValueError), bad=reader(TypeError)) == (1, {"bad": (3, 0, 3), "good": (3, 3, 0)})
    assert run(3, good=reader(TypeError), bad=reader(ValueError)) == (0, {"bad": (3, 3, 0), "good": (3, 3, 0)})
    assert run(4, good=reader(ValueError)) == (0, {"bad": (3, 3, 0), "good": (4, 4, 0)})


def test_the_readers_are_those_of_the_modules_of_fuzzers():
    assert {"config/config", "data_sets/tar", "outputs/sounds", "sounds/sounds", "weights/ckpt"} <= fuzz.readers().keys()
