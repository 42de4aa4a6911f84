"""Two processes on one output, and signals at each moment of a job."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddim_fast import edit, evaluate, export, interpolate, reconstruct, restore, sample, train
from ddim_fast.io.locks import hold, release_all
from tests.helpers.forked_runs import cut_short, pairs
from tests.helpers.small_runs import RUN

REFUSED = re.compile(r"error: --out \S+ is being written by process \d+ on \S+; wait for it or end it, or name another place")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclasses.dataclass(frozen=True)
class Job:
    """A small job: its command, as a module and by name, its options, and the suffix of its output."""

    command: object
    options: list[object]
    suffix: str = ""

    @property
    def name(self):
        return self.command.__name__.removeprefix("ddim_fast.")


@pytest.fixture
def photos(tmp_path):
    """Eight grey images of 8x8."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def make_job(request, checkpoint, photos, tmp_path, monkeypatch):
    """A function -> a small job by its name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = ["--model", checkpoint, "--steps", 1, "--device", "cpu", "--batch-size", 2]
    jobs = {
        "folder": Job(sample, [*few, "--num-images", 5]),
        "npz": Job(sample, [*few, "--num-images", 5], ".npz"),
        "restore": Job(restore, [photos, "--task", "colorize", "--travel", 1, 1, "--num-images", 3, *few]),
        "film": Job(interpolate, ["--video", photos, *few], ".gif"),
        "evaluate": Job(evaluate, ["--loss", "--data", photos, "--model", checkpoint, "--device", "cpu", "--batch-size", 2]),
        "edit": Job(edit, [photos, "--strength", 0.5, *few]),
        "reconstruct": Job(reconstruct, [photos, *few]),
        "export": Job(export, ["--to", "checkpoint", "--model", checkpoint]),
        "train": Job(train, ["--data", photos, *RUN[:-1], "--steps", 3, "--save-every", 1, "--sample-every", 2]),
    }
    return jobs.__getitem__


def contents(path) -> dict[str, bytes]:
    """The files that are the result, by name; of a table the rows, of losses the steps."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for name in found.keys() & {"evaluation.json"}:
        found[name] = json.loads(found[name])["rows"]
    for name in found.keys() & {"stats.jsonl"}:
        found[name] = [json.loads(line)["step"] for line in found[name].splitlines()]
    others = ("evaluation.md", "train.json", "training_state.pt")
    return {name: data for name, data in found.items() if not name.endswith(others)}


def place(out, number):
    return out.with_name(out.name.replace("#", str(number)))


@pytest.mark.parametrize(
    "name,count",
    [("npz", 4), slow("train", 10), *(slow(name, 100) for name in ("folder", "npz", "film", "restore", "train"))],
)
def test_of_two_processes_on_one_output_one_is_refused(name, count, make_job, tmp_path):
    job, out = make_job(name), tmp_path / "out" / "#"
    out = out.with_suffix(job.suffix)
    codes, told = pairs(job.name, count, out, job.options)
    assert len(codes) == count
    for number, pair in enumerate(codes, 1):
        assert 0 in pair and set(pair) <= {0, 1, 2}, pair
        assert contents(place(out, number)) == contents(place(out, 0))
    lines = told.splitlines()
    assert len([line for line in lines if REFUSED.fullmatch(line)]) == sum(pair.count(1) for pair in codes) > 0
    # The other had ended when this one looked.
    ended = [line for line in lines if "holds a run already" in line or re.search(r"--out \S+\.gif exists", line)]
    assert len(ended) == sum(pair.count(2) for pair in codes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {place(out, number).name for number in range(count + 1)}


@pytest.mark.parametrize(
    "name,number",
    [
        ("npz", signal.SIGTERM),
        slow("evaluate", signal.SIGHUP),
        slow("train", signal.SIGTERM),
        slow("train", signal.SIGKILL),
        slow("folder", signal.SIGTERM),
        slow("restore", signal.SIGINT),
        slow("film", signal.SIGTERM),
        slow("train", signal.SIGUSR1),
        *(slow(name, signal.SIGKILL) for name in ("folder", "npz", "restore", "film", "evaluate")),
    ],
)
def test_a_signal_at_any_file_ends_a_job_that_goes_on_to_the_same_result(name, number, make_job, tmp_path, run_here):
    job, out = make_job(name), tmp_path / "out" / "#"
    out = out.with_suffix(job.suffix)
    codes, told = cut_short(job.name, number, out, job.options)
    *stopped, finished = codes
    assert finished == 0 and len(stopped) >= 3 and set(stopped) == {-9 if number == signal.SIGKILL else 128 + number}, told
    assert "Traceback" not in told and "error" not in told
    for moment in range(1, len(codes) + 1):
        again = ["--resume"] if name == "train" and place(out, moment).joinpath("train.json").exists() else []
        if name != "film" or not place(out, moment).exists():  # a film that is there is not made again
            code, _, err = run_here(job.command, *job.options, *again, "--quiet", "--out", place(out, moment))
            assert code == 0, err
        assert_same(name, place(out, moment), place(out, 0))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {place(out, k).name for k in range(len(codes) + 1)}


def assert_same(name, one, other):
    found, whole = contents(one), contents(other)
    if name == "train":  # the step at which it was stopped has a line of its own, and no grid
        steps = [found.pop("stats.jsonl"), whole.pop("stats.jsonl")]
        assert steps[0] == sorted(set(steps[0])) and steps[0][-1] == steps[1][-1]
        found, whole = ({n: d for n, d in files.items() if not n.startswith("samples/")} for files in (found, whole))
    if name == "evaluate":
        for rows in (found, whole):
            rows["evaluation.json"] = [{**row, "run": 1} for row in rows["evaluation.json"]]
    assert found == whole


@pytest.mark.parametrize("name", ["edit", "reconstruct", "export"])
def test_a_folder_that_comes_to_its_place_whole_is_locked_before(name, make_job, run_here, here):
    job = make_job(name)
    options = [*job.options, "--out", "o"] if name == "export" else [*job.options, "--quiet", "--out", "o"]
    hold(here / ".o.lock", "it")
    code, _, err = run_here(job.command, *options)
    assert code == 1 and REFUSED.fullmatch(err.strip()) and not (here / "o").exists()
    assert run_here(job.command, *options)[0] == 0  # the command has released what its process held
    assert [path.name for path in here.iterdir() if path.name != "photos"] == ["o"]


def test_a_place_that_nobody_has_named_is_another_one(make_job, run_here, here):
    job = make_job("folder")
    hold(here / "samples", "it")
    assert run_here(sample, *job.options, "--quiet")[0] == 0
    release_all()
    assert sorted(path.name for path in here.iterdir()) == ["samples-2"]


def test_a_measurement_is_one_process_and_others_go_beside_it(make_job, run_here, here, interrupted):
    options = [*make_job("evaluate").options, "--quiet", "--out", "o"]
    with interrupted(1):
        code, _, err = run_here(evaluate, *options)
    assert code == 130 and err == "stopped: the same command goes on with what is in o\n"
    (parts,) = (here / "o").glob(".parts-*")
    hold(parts, "it")
    code, _, err = run_here(evaluate, *options)
    assert code == 1 and REFUSED.fullmatch(err.strip())
    hold(parts, "it")  # the command has released what its process held
    assert run_here(evaluate, *options, "--num-images", 4)[::2] == (0, "")


@pytest.mark.slow
def test_the_ranks_of_torchrun_are_one_job_which_a_signal_ends(make_job, tmp_path):
    job, out = make_job("npz"), tmp_path / "o.npz"
    options = [*job.options[:3], 40, *job.options[4:-1], 400, "--out", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "ddim_fast.sample", *options]
    words = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        parts = tmp_path / "o.npz.partial"
        while run.poll() is None and not list(parts.glob("batch-*")):
            pass
        run.terminate()
        told = run.communicate(timeout=100)[1]
    assert re.search(r"stopped: \S+o\.npz holds \d+ of 400 images; the same command continues it", told), told
    assert "error:" not in told and not (parts / ".lock").exists()
    assert list(parts.glob(".batch*")) == []
