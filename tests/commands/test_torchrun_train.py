"""Training by torchrun when one of its processes is killed or gets a signal."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from ddim_fast import UNet, train
from tests.helpers.small_runs import RUN

# Once, process WHICH gets the signal NUMBER in its eighth step.
SCRIPT = """
import os
from ddim_fast import train
from ddim_fast.cli.parser import run_command
from ddim_fast.training.loop import Trainer

learning_rate = Trainer._learning_rate

def at(trainer, step):
    if (step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (7, "WHICH", "0"):
        os.kill(os.getpid(), NUMBER)
    return learning_rate(trainer, step)

Trainer._learning_rate = at
run_command(train.main)
"""


@pytest.fixture
def photos(tmp_path):
    """A folder of eight small images."""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def options(photos):
    """Of a run of twelve steps, with a checkpoint each five."""
    return ["--data", photos, *RUN, "--lr-schedule=constant", "--dropout=0", "--steps=12", "--save-every=5"]


@pytest.fixture
def torchrun(tmp_path):
    """A function: train by two processes, one of which gets a signal -> exit code, stderr."""

    def run(rank, number, *arguments, launch=()):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.replace("WHICH", str(rank)).replace("NUMBER", str(number)))
        starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *launch]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [str(word) for word in [*starter, script, *arguments]]
        # Processes that wait for a dead one would do so for days.
        result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
        return result.returncode, result.stderr

    return run


def step_in(out) -> int:
    return torch.load(out / "training_state.pt", weights_only=True)["step"]


def assert_same_weights(one, other) -> None:
    expected = UNet.from_pretrained(other).state_dict()
    for name, tensor in UNet.from_pretrained(one).state_dict().items():
        assert float((tensor - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_another_number(rank, torchrun, options, tmp_path, run_here):
    out, begun = tmp_path / "run", time.time()
    code, told = torchrun(rank, 9, *options, "--out", out)
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 1 and line == (
        f"error: another process of this run has ended, so this one ends too ({out} keeps its last checkpoint; the same "
        "command with --resume goes on)"
    )
    written = (out / "training_state.pt").stat().st_mtime
    assert begun < written and step_in(out) == 5
    assert run_here(train, "--resume", *options, "--out", out)[::2] == (0, "")  # one process
    assert run_here(train, *options, "--out", tmp_path / "whole")[0] == 0
    assert step_in(out) == 12
    assert_same_weights(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(torchrun, options, tmp_path):
    out = tmp_path / "run"
    code, told = torchrun(1, 15, *options, "--out", out)
    assert code == 1 and told.count(f"stopped: {out} holds a checkpoint of step 8; the same command with --resume goes on") == 1
    assert "error: " not in told and 'Traceback (most recent call last):\n  File "/script' not in told
    assert step_in(out) == 8 and not (out / ".lock").exists()
    assert [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()] == [2, 4, 5, 6, 8]


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint_after_a_failure(torchrun, options, tmp_path, run_here):
    out = tmp_path / "run"
    code, told = torchrun(1, 9, *options, "--resume=auto", "--out", out, launch=["--max-restarts=1"])
    assert code == 0 and step_in(out) == 12, told
    assert [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()] == [2, 4, 5, 6, 8, 10, 12]
    assert run_here(train, *options, "--out", tmp_path / "whole")[0] == 0
    assert_same_weights(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_one_line(torchrun, options, tmp_path):
    code, told = torchrun(0, 0, *options, "--batch-size=5", "--out", tmp_path / "run")
    lines = [line for line in told.splitlines() if "error: --" in line]
    assert code == 1 and len(lines) == 1
    assert "error: --batch-size must be a multiple of 2, for 2 processes; got 5" in lines[0]
    assert not (tmp_path / "run").exists()
