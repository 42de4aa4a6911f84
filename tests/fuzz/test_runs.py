"""Damaged files in the folder of a run that goes on: its options, its data, its losses and its training state."""

import contextlib
import io
import sys

from PIL import Image

from ddim_fast import train
from ddim_fast.cli.parser import run_command
from tests.fuzz.test_weights import mutate_pickle
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes, mutate_json

NETWORK = "sample_size=8 base_channels=8 channel_multipliers=[1] layers_per_block=1 attention_resolutions=[] norm_num_groups=4"
OPTIONS = ("--preset=grey-32", "--set", *NETWORK.split(), "--batch-size=4", "--sample-every=9", "--class-conditional")


def run(folder, *options):
    """The command; what it refuses in one line is a ValueError."""
    command = ["train", *options, "--steps=1", "--device=cpu", "--dtype=float32", "--quiet", "--out", str(folder / "run")]
    argv, sys.argv = sys.argv, command
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_command(train.main)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(errors.getvalue().removesuffix("\n")) from stop
    finally:
        sys.argv = argv


def write(folder):
    for i in range(4):
        (folder / "photos" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(folder / "photos" / f"{i % 2}" / f"{i}.png")
    run(folder, "--data", str(folder / "photos"), *OPTIONS)
    return [folder / "run" / name for name in ("train.json", "data.json", "stats.jsonl", "training_state.pt")]


def mutate(random, data):
    """By what it is: a training state, losses, or one of the records."""
    if data[:2] == b"PK":
        return mutate_pickle(random, data)
    damaged = (mutate_bytes if data.count(b"\n") == 1 else mutate_json)(random, data)
    return damaged.replace(b'"/"', b'"/nowhere"')  # all pictures of this machine are a data set too, a large one


RUN = Fuzzer("run", write, lambda path: run(path.parents[1], "--resume"), mutate)


def test_damaged_runs():
    RUN.check(40)


if __name__ == "__main__":
    main(RUN)
