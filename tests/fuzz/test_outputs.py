"""Damaged files in the output of a job that goes on: its record, its pictures, sounds and batches, and results of
evaluations."""

import numpy as np
import pytest

from ddim_fast.evaluation.results import Results
from ddim_fast.io.locks import release_all
from ddim_fast.io.records import RECORD
from ddim_fast.jobs.outputs import Batches, NpzFile, PngFolder
from ddim_fast.jobs.places import place_output
from ddim_fast.jobs.sound_outputs import WavFolder
from tests.fuzz.test_data_sets import damage_npz
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes, mutate_json
from tests.helpers.tones import MEL

JOB = {"command": "sample", "settings": {"steps": 20, "seeds": "0-4", "guidance": None}}
BATCHES = Batches(range(5), [0, 1, 0, 1, 0], 2, (4, 6, 3))


def begin(output):
    """A job with its three batches."""
    output.begin(JOB)
    random = np.random.default_rng(0)
    for k in range(len(BATCHES)):
        if isinstance(output, WavFolder):
            items = random.integers(-999, 999, (len(BATCHES[k][0]), MEL.length), dtype=np.int16)
        else:
            items = random.integers(0, 256, (len(BATCHES[k][0]), *BATCHES.image_shape), dtype=np.uint8)
        output.write(k, items)
    return output


def write_pictures(folder):
    output = begin(PngFolder(folder / "out", BATCHES))
    return [output.folder / RECORD, *output.files(0)]


def write_sounds(folder):
    output = begin(WavFolder(folder / "out", BATCHES, MEL))
    return [output.folder / RECORD, *output.files(0)]


def write_batches(folder):
    output = begin(NpzFile(folder / "job" / "out.npz", BATCHES))
    return [output.folder / RECORD, *output.files(0)]


def write_archive(folder):
    output = begin(NpzFile(folder / "job" / "out.npz", BATCHES))
    output.finish()
    return [output.path]


def write_results(folder):
    results = Results(folder)
    run = {"command": "python -m ddim_fast.evaluate", "machine": "a machine", "ddim_fast": "0", "torch": "0"}
    base = {"model": "m", "solver": "ddim", "spacing": "linear", "eta": 0.0, "steps": 5, "seeds": "0-9"}
    found = {
        "images": 10,
        "reference images": "20",
        "label": "FID-10",
        "FID-10": 3.0,
        "KID": 0.1,
        "KID standard error": 0.01,
        "evaluations": 5.0,
    }
    results.add("quality", {**base, "reference": "r"}, found, run)
    results.add("reconstruction", {**base, "data": "d"}, {"error": 0.1, "error standard error": 0.01, "images": 10}, run)
    results.add("loss", {"model": "m", "data": "d"}, {"loss": 0.1, "loss by timestep": {"0-9": 0.1}, "images": 10}, run)
    return [folder / "evaluation.json"]


def go_on(make):
    """A reader: as a command does, makes again what is not whole, and reads everything back."""

    def read(path):
        try:
            place = path.parent.with_suffix("") if path.parent.suffix == ".partial" else path.parent
            output, there = place_output(place, "samples", make, JOB)
            item = output.read(2)[:1]
            for k in output.prepare(there, JOB) or ():
                output.write(k, np.repeat(item, len(BATCHES[k][0]), 0))
            output.preview(5)
        finally:
            release_all()

    return read


def check_archive(path):
    output = NpzFile(path, BATCHES)
    output.check(output.record(), JOB)


def mutate(random, data):
    return (mutate_json if data.startswith(b"{") else damage_npz if data.startswith(b"PK") else mutate_bytes)(random, data)


FUZZERS = (
    Fuzzer("pictures", write_pictures, go_on(lambda path: PngFolder(path, BATCHES)), mutate),
    Fuzzer("sounds", write_sounds, go_on(lambda path: WavFolder(path, BATCHES, MEL)), mutate),
    Fuzzer("batches", write_batches, go_on(lambda path: NpzFile(path, BATCHES)), mutate),
    Fuzzer("archive", write_archive, check_archive, mutate),
    Fuzzer("results", write_results, lambda path: Results(path.parent).report(), mutate_json),
)


@pytest.mark.parametrize("fuzzer", FUZZERS, ids=lambda fuzzer: fuzzer.name)
def test_damaged_outputs(fuzzer):
    fuzzer.check(40)


if __name__ == "__main__":
    main(*FUZZERS)
