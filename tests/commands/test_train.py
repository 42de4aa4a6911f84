import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

from ddim_fast import Sampler, UNet, train
from ddim_fast.cli.parser import run_command
from ddim_fast.jobs.background import Background
from ddim_fast.models.widening import widen
from ddim_fast.training.checkpoints import TrainingCheckpoint
from ddim_fast.training.loop import Trainer
from tests.helpers.small_runs import NETWORK, RUN, assert_one_line

FILES = {"config.json", "model.safetensors", "training_state.pt", "stats.jsonl", "train.json", "data.json", "samples"}


@pytest.fixture
def photos(tmp_path):
    """A folder of two folders of four small images."""
    folder = tmp_path / "photos"
    for i in range(8):
        (folder / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(folder / f"class-{i % 2}" / f"{i}.png")
    return folder


@pytest.fixture
def run_train(monkeypatch, capsys):
    """A function running the command in this process -> (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command(train.main)
        return caught.value.code, *capsys.readouterr()

    return run


def names(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


def weights_in(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_command_trains_a_checkpoint(photos, tmp_path):
    out = tmp_path / "new" / "run"
    command = [sys.executable, "-m", "ddim_fast.train", "--data", photos, *RUN[:-1], "--steps=5", "--out", out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python -m ddim_fast.sample --model {out}" in result.stdout
    assert "5/5" in result.stderr and "Traceback" not in result.stderr
    assert names(out) == FILES
    assert names(out / "samples") == {"0000005.png"}

    stats = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in stats] == [2, 4, 5]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["lr"] == 1e-3 for line in stats)
    assert all(line["images_per_s"] > 0 for line in stats)
    record = json.loads((out / "train.json").read_text())
    assert record["data"] == str(photos) and record["steps"] == 5 and record["preset"] == "grey-32"
    assert not {"out", "resume", "device", "quiet"} & set(record)
    model = UNet.from_pretrained(out)
    assert model.config.level_channels == (8, 16)
    assert Sampler(model, steps=2).sample(seeds=[0]).isfinite().all()


def test_a_usage_error_of_the_command_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "ddim_fast.train", "--preset=cifar", "--out", tmp_path / "run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert_one_line(result.stderr, "python -m ddim_fast.train: error: ", "--preset", "'cifar'", "cifar10-64", "--help")
    assert names(tmp_path) == set()


def test_consistency_goes_on_with_the_teacher_of_its_beginning(photos, tmp_path, run_train):
    run_train("--data", photos, *RUN, "--steps=2", "--out", tmp_path / "init")
    options = ["--init", tmp_path / "init", "--data", photos, *RUN[len(NETWORK) :], "--consistency=3,1", "--steps=4"]
    code, out, err = run_train(*options, "--out", tmp_path / "whole")
    assert (code, err) == (0, "") and out.endswith("whole --solver consistency --spacing adaptive --steps 2\n")
    assert UNet.from_pretrained(tmp_path / "whole").fitted_timesteps == {"consistency": {1: [3], 2: [3, 1]}}
    run_train(*options, "--accumulate=2", "--out", tmp_path / "sliced")
    run_train(*options, "--steps=2", "--out", tmp_path / "parts")
    assert run_train("--resume", "--steps=4", "--out", tmp_path / "parts")[0] == 0
    assert weights_in(tmp_path / "parts") == weights_in(tmp_path / "whole") != weights_in(tmp_path / "init")
    whole, sliced = (UNet.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "sliced"))
    torch.testing.assert_close(sliced, whole, rtol=1e-3, atol=1e-5)


def test_resume_goes_on_as_if_never_stopped(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--lr-schedule=constant", "--steps"]
    assert run_train(*start, 6, "--out", tmp_path / "whole")[0] == 0
    assert run_train(*start, 4, "--out", tmp_path / "parts")[0] == 0
    assert weights_in(tmp_path / "parts") != weights_in(tmp_path / "whole")
    with open(tmp_path / "parts" / "stats.jsonl", "a") as stats:  # a step after the checkpoint, lost when the run was killed
        stats.write('{"step": 5}\n')
    code, out, err = run_train("--out", tmp_path / "parts", "--resume", "--steps", 6, "--device=cpu", "--quiet")
    assert (code, err) == (0, "") and "trained to step 6" in out
    assert weights_in(tmp_path / "parts") == weights_in(tmp_path / "whole")
    lines = (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
    assert json.loads((tmp_path / "parts" / "train.json").read_text())["steps"] == 6
    assert names(tmp_path / "parts") == {*FILES, "checkpoints"} and names(tmp_path / "parts" / "checkpoints") == {"0000004"}


def test_a_scheduler_gives_the_same_command_until_the_run_is_finished(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--lr-schedule=constant", "--recipe=fast", "--out"]
    assert run_train(*start, tmp_path / "whole", "--steps=4")[0] == 0
    again = [*start, tmp_path / "parts", "--resume", "auto", "--steps=4"]
    assert run_train(*again, "--minutes=1e-9")[0] == 0  # there was no run
    assert torch.load(tmp_path / "parts" / "training_state.pt")["step"] == 1
    for _ in range(2):  # the second one finds it finished
        code, out, err = run_train(*again)
        assert (code, err) == (0, "") and "trained to step 4" in out
    assert weights_in(tmp_path / "parts") == weights_in(tmp_path / "whole")
    assert [json.loads(line)["step"] for line in (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()] == [1, 2, 4]
    (tmp_path / "parts" / "train.json").unlink()
    code, _, err = run_train(*again)
    assert code == 2
    assert_one_line(err, "holds a checkpoint already, which is no run's")


def test_a_run_that_ended_before_its_first_checkpoint_begins_by_the_same_command(photos, tmp_path, run_train):
    again = ["--data", photos, *RUN, "--steps=3", "--resume=auto", "--out", tmp_path / "run"]
    assert run_train(*again, "--lr=1e30")[0] == 1
    assert run_train(*again)[::2] == (0, "")
    assert run_train("--data", photos, *RUN, "--steps=3", "--out", tmp_path / "fresh")[0] == 0
    assert weights_in(tmp_path / "run") == weights_in(tmp_path / "fresh")


def test_processes_that_do_not_share_a_folder_do_not_train(photos, tmp_path, run_train, monkeypatch):
    monkeypatch.setattr("ddim_fast.io.processes.Processes.largest", lambda self, values: [5, 0])  # one is at step 5, one at 0
    code, _, err = run_train("--data", photos, *RUN, "--steps=1", "--out", tmp_path / "run")
    assert code == 1
    assert_one_line(err, f"error: --out {tmp_path}/run: processes find different checkpoints there", "share")


@pytest.mark.parametrize(
    "options,part",
    [
        (["--prediction-type=v_prediction"], "the network of this run has prediction_type epsilon, not v_prediction"),
        (["--latents=elsewhere"], "--latents elsewhere: a run goes on with its own"),
        (["--optimizer=muon"], "--optimizer muon: a run goes on with its own"),
    ],
)
def test_a_run_goes_on_with_its_own_network(options, part, photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=1", "--out", out)[0] == 0
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}
    code, _, err = run_train("--out", out, "--resume", "--steps=2", "--device=cpu", *options)
    assert code == 2
    assert_one_line(err, part)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_what_comes_after_the_checkpoint_is_forgotten(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--ema-snapshots=2", "--steps=4", "--out", out)[0] == 0
    shutil.copy(out / "ema/00000004.safetensors", out / "ema/00000006.safetensors")
    with open(out / "stats.jsonl", "a") as stats:  # the disk was full
        stats.write('{"step": 4, "lo')
    assert run_train("--out", out, "--resume", "--steps=5", "--device=cpu", "--quiet")[0] == 0
    assert names(out / "ema") == {f"{step:08d}.safetensors" for step in (2, 4, 5)}
    assert [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()] == [2, 4, 5]


def test_an_interrupted_run_ends_with_a_checkpoint_of_its_last_step(photos, tmp_path, run_train, monkeypatch):
    start = ["--data", photos, *RUN, "--lr-schedule=constant"]
    assert run_train(*start, "--steps", 4, "--out", tmp_path / "whole")[0] == 0
    learning_rate = Trainer._learning_rate

    def ctrl_c(trainer, step):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(trainer, step)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_learning_rate", ctrl_c)
        code, _, err = run_train(*start, "--steps", 1000, "--out", tmp_path / "parts")
    assert code == 130
    answer, end = err.strip().splitlines()
    assert answer.startswith("stopping after this step")
    assert "holds a checkpoint of step 2" in end and "--resume goes on" in end
    assert not (tmp_path / "parts" / "samples").exists()
    assert run_train("--out", tmp_path / "parts", "--resume", "--steps", 4, "--device=cpu", "--quiet")[0] == 0
    assert weights_in(tmp_path / "parts") == weights_in(tmp_path / "whole")


def test_training_goes_on_while_a_checkpoint_is_written(photos, tmp_path, run_train, monkeypatch):
    out, write, learning_rate, later = tmp_path / "run", TrainingCheckpoint.write, Trainer._learning_rate, threading.Event()

    def at_step(trainer, step):
        if step == 3:
            later.set()
        return learning_rate(trainer, step)

    def write_later(checkpoint, folder):
        assert later.wait(60), "training waits for the checkpoint"
        write(checkpoint, folder)

    monkeypatch.setattr(Trainer, "_learning_rate", at_step)
    monkeypatch.setattr(TrainingCheckpoint, "write", write_later)
    assert run_train("--data", photos, *RUN, "--steps=4", "--save-every=2", "--out", out)[0] == 0
    assert torch.load(out / "training_state.pt")["step"] == 4
    (before,) = (out / "checkpoints").iterdir()
    assert before.name == "0000002" and torch.load(before / "training_state.pt")["step"] == 2


@pytest.mark.parametrize("failing,last", [(2, 2), (6, 6)])
def test_a_full_disk_ends_the_run_at_the_next_step_or_at_its_end(failing, last, photos, tmp_path, run_train, monkeypatch):
    out, write = tmp_path / "run", TrainingCheckpoint.write

    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_or_fail(checkpoint, folder):
        with monkeypatch.context() as patch:
            if checkpoint.state["step"] == failing:
                patch.setattr(os, "fsync", fill)
            write(checkpoint, folder)

    monkeypatch.setattr(TrainingCheckpoint, "write", write_or_fail)
    monkeypatch.setattr(Background, "check", Background.finish)  # as if steps took longer than writing
    code, _, err = run_train(
        "--data", photos, *RUN[:-2], "--log-every=1", "--quiet", "--steps=6", "--save-every=2", "--out", out
    )
    assert (code, err) == (1, "error: No space left on device; free some space, or name a place on another disk\n")
    assert json.loads((out / "stats.jsonl").read_text().splitlines()[-1])["step"] == last
    assert not list(out.rglob(".*"))


def test_a_second_signal_leaves_no_half_of_a_checkpoint(photos, tmp_path, run_train, monkeypatch):
    """The thread that writes is waited for, before the folder is another process's."""
    out, write, ended = tmp_path / "run", TrainingCheckpoint.write, []

    def interrupted(checkpoint, folder):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        write(checkpoint, folder)
        ended.append((folder / ".lock").exists())

    monkeypatch.setattr("ddim_fast.io.stopping._PATIENCE", 60)
    monkeypatch.setattr(TrainingCheckpoint, "write", interrupted)
    code, _, err = run_train("--data", photos, *RUN, "--steps=10000", "--save-every=2", "--sample-every=10000", "--out", out)
    assert code == 143 and "error" not in err
    assert ended and all(ended) and torch.load(out / "training_state.pt")["step"] >= 2
    assert not list(out.rglob(".*"))


def test_a_second_interrupt_does_not_wait_for_the_step(photos, tmp_path, run_train, monkeypatch):
    def ctrl_c_twice(trainer, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_learning_rate", ctrl_c_twice)
    code, _, err = run_train("--data", photos, *RUN, "--steps=4", "--out", tmp_path / "run")
    assert code == 130 and "stopped:" not in err
    assert not (tmp_path / "run" / "training_state.pt").exists()


@pytest.mark.parametrize("every", [2, 4])
def test_an_interrupted_grid_is_given_up_and_made_when_the_run_goes_on(every, photos, tmp_path, run_train, monkeypatch):
    start, out = ["--data", photos, *RUN, "--steps=4", f"--sample-every={every}"], tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ddim_fast.cli.trainers.save_image", lambda *_: signal.raise_signal(signal.SIGINT))
        code, _, err = run_train(*start, "--out", out)
        assert code == 130 and f"{out} holds a checkpoint of step {every};" in err
        assert names(out / "samples") == set() and torch.load(out / "training_state.pt")["step"] == every
        # A step more would leave the grid out for good. With 4 the run is finished but for it.
        assert run_train(*start, "--resume", "--out", out)[0] == 130
        assert names(out / "samples") == set() and torch.load(out / "training_state.pt")["step"] == every
    assert run_train(*start, "--resume", "--out", out)[0] == 0
    assert run_train(*start, "--out", tmp_path / "whole")[0] == 0
    grids = {f"{step:07d}.png" for step in range(every, 5, every)}
    assert names(out / "samples") == grids == names(tmp_path / "whole" / "samples")
    for name in grids:
        assert (out / "samples" / name).read_bytes() == (tmp_path / "whole" / "samples" / name).read_bytes()


def test_a_run_says_what_it_trains_and_how_long_it_takes(photos, tmp_path, run_train, monkeypatch):
    monkeypatch.setattr("ddim_fast.jobs.training._Estimate._SECONDS", 0)
    options = [option for option in RUN if option != "--quiet"]
    out = tmp_path / "run"
    code, _, err = run_train("--data", photos, *options, "--steps=5", "--out", out)
    parameters = sum(p.numel() for p in UNet.from_pretrained(out).parameters())
    assert code == 0
    assert err.startswith(
        f"preset grey-32: {parameters:,} parameters, float32 on cpu\ndata: {photos}, 8 images of 1x8x8, 4 a step\nsteps: 5\n"
    )
    assert "first step:" in err and "sampling a grid:" in err and "about 1 s for the remaining 2 steps\n" in err
    _, _, err = run_train("--out", out, "--resume", "--steps=1006", "--warmup=2000", "--device=cpu", "--minutes=1e-9")
    assert "steps: 1,006, 5 of them done\n" in err
    _, _, err = run_train("--data", photos, *options, "--warmup=9", "--steps=1", "--out", tmp_path / "short")
    assert "steps: 1; all within the warm-up of 9: use --recipe fast for short runs\n" in err


def test_the_default_number_of_steps_is_modest_on_a_cpu_and_stays_a_runs_own(photos, tmp_path, run_train):
    out, options = tmp_path / "run", [option for option in RUN if option != "--quiet"]
    for recipe in ("ddpm", "fast"):
        assert train._default_steps(recipe, "cpu") == 2000
    assert (train._default_steps("ddpm", "cuda"), train._default_steps("fast", "cuda")) == (800_000, 100_000)
    code, _, err = run_train("--data", photos, *options, "--minutes=1e-9", "--out", out)
    assert code == 0 and "steps: 2,000, the default on a CPU; --steps N asks for another number\n" in err
    record = json.loads((out / "train.json").read_text())
    assert record["steps"] == 2000
    (out / "train.json").write_text(json.dumps({**record, "steps": 3}))
    code, stdout, err = run_train("--out", out, "--resume", "--device=cpu", "--quiet")
    assert (code, err) == (0, "") and "trained to step 3;" in stdout


def test_without_a_compiler_the_step_is_not_compiled(photos, tmp_path, run_train, monkeypatch):
    monkeypatch.setattr("ddim_fast.cli.trainers.why_not_compiled", lambda device: "no working C++ compiler")
    out = tmp_path / "run"
    code, _, err = run_train("--data", photos, *RUN[:-1], "--steps=2", "--compile", "--out", out)
    assert code == 0 and "so the training step is not compiled: no working C++ compiler" in err
    assert json.loads((out / "train.json").read_text())["compile"]  # elsewhere the run goes on compiled


def test_a_schedule_of_few_timesteps_has_a_grid(photos, tmp_path, run_train):
    options = [*RUN[:-7], "num_train_timesteps=10", *RUN[-7:]]
    code, _, err = run_train("--data", photos, *options, "--steps=1", "--out", tmp_path / "run")
    assert code == 0, err


def test_set_is_stronger_than_a_recipe(photos, tmp_path, run_train):
    options = [*RUN[:-7], "prediction_type=sample", *RUN[-7:], "--recipe=fast", "--steps=1"]
    code, _, err = run_train("--data", photos, *options, "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run/config.json").read_text())["prediction_type"] == "sample"


def test_a_run_that_stops_after_its_minutes_goes_on_later(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--lr-schedule=constant"]
    assert run_train(*start, "--steps", 3, "--out", tmp_path / "whole")[0] == 0
    code, out, _ = run_train(*start, "--steps", 1000, "--minutes", 1e-9, "--out", tmp_path / "parts")
    assert code == 0 and "trained to step 1;" in out
    code, out, _ = run_train("--out", tmp_path / "parts", "--resume", "--steps", 3, "--device=cpu", "--quiet")
    assert code == 0 and "trained to step 3;" in out
    assert weights_in(tmp_path / "parts") == weights_in(tmp_path / "whole")


def test_averages_of_any_length_after_a_run_in_parts(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--ema-snapshots=2", "--steps"]
    assert run_train(*start, 5, "--out", tmp_path / "whole")[0] == 0
    assert run_train(*start, 3, "--out", tmp_path / "parts")[0] == 0
    assert run_train("--out", tmp_path / "parts", "--resume", "--steps=5", "--device=cpu", "--quiet")[0] == 0
    assert names(tmp_path / "whole") == FILES | {"ema"}
    assert names(tmp_path / "whole/ema") == {f"{step:08d}.safetensors" for step in (2, 4, 5)}
    assert names(tmp_path / "parts/ema") == {f"{step:08d}.safetensors" for step in (2, 3, 4, 5)}
    for step in (2, 4, 5):
        file = f"ema/{step:08d}.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_averages_begin_with_their_run(photos, tmp_path, run_train):
    assert run_train("--data", photos, *RUN, "--steps=2", "--out", tmp_path / "run")[0] == 0
    more = ("--resume", "--steps=4", "--ema-snapshots=1", "--device=cpu", "--quiet")
    code, _, err = run_train("--out", tmp_path / "run", *more)
    assert code == 1
    assert_one_line(err, "error: ", "kept no averages for snapshots so far")
    assert names(tmp_path / "run") == FILES


def test_a_class_conditional_run_counts_the_folders(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--class-conditional", "--steps=1", "--out", out)[0] == 0
    config = UNet.from_pretrained(out).config
    assert config.num_classes == 2 and config.class_names == ("class-0", "class-1")


def test_a_run_that_goes_on_keeps_what_its_config_says_for_people(photos, tmp_path, run_train):
    out, more = tmp_path / "run", ("--resume", "--device=cpu", "--quiet")
    assert run_train("--data", photos, *RUN, "--class-conditional", "--steps=1", "--out", out)[0] == 0
    values = json.loads((out / "config.json").read_text())
    for step, advice in (
        (2, {"class_names": None, "guidance": None}),  # as version 0.1 wrote it
        (3, {"class_names": ["cat", "dog"], "guidance": 2.5}),
    ):
        (out / "config.json").write_text(json.dumps({**values, **advice}))
        assert run_train("--out", out, *more, f"--steps={step}")[::2] == (0, "")
    config = UNet.from_pretrained(out).config
    assert config.class_names == ("cat", "dog") and config.guidance == 2.5


@pytest.mark.parametrize(
    "folders, names, labels",
    [
        (["Class-1"], ("class-0", "class-1"), {1}),  # of the model: its numbers
        (["a", "b"], ("a", "b"), {0, 1}),  # all new
        (["a"], None, {0}),  # nobody knows what the second is by now
        (["0", "1"], ("class-0", "class-1"), {0, 1}),  # numbers are no names
    ],
)
def test_names_where_training_begins_with_a_model(folders, names, labels, photos, tmp_path, run_train, monkeypatch):
    run_train(*RUN, "--data", photos, "--class-conditional", "--steps=1", "--out", tmp_path / "init")
    for folder, own in zip(folders, sorted(photos.iterdir()), strict=False):
        shutil.copytree(own, tmp_path / "data" / folder)
    seen, init = [], Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, model, data, *rest: seen.append(data) or init(self, model, data, *rest)
    )
    options = ["--init", tmp_path / "init", "--data", tmp_path / "data", *RUN[len(NETWORK) :], "--steps=1"]
    assert run_train(*options, "--out", tmp_path / "run")[0] == 0
    assert UNet.from_pretrained(tmp_path / "run").config.class_names == names
    assert set(seen[0].labels.tolist()) == labels


def test_names_that_a_user_sets_are_kept(photos, tmp_path, run_train):
    network = [*NETWORK, "num_classes=2", 'class_names=["left", "right"]', *RUN[len(NETWORK) :], "--class-conditional"]
    assert run_train("--data", photos, *network, "--steps=1", "--out", tmp_path / "run")[0] == 0
    assert UNet.from_pretrained(tmp_path / "run").config.class_names == ("left", "right")


def test_options_change_the_network(photos, tmp_path, run_train):
    out = tmp_path / "run"
    extra = ["--prediction-type=v_prediction", "--dropout=0.3", "--min-snr-gamma=5", "--no-flip", "--steps=1"]
    assert run_train("--data", photos, *RUN, *extra, "--out", out)[0] == 0
    config = UNet.from_pretrained(out).config
    assert (config.prediction_type, config.dropout) == ("v_prediction", 0.3)


@pytest.mark.parametrize("arguments,missing", [(["--out", "run"], "--data"), (["--data", "photos"], "--out")])
def test_what_is_required_is_named(arguments, missing, tmp_path, monkeypatch, run_train):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_train(*arguments)
    assert code == 2
    assert_one_line(err, missing, "required")
    assert names(tmp_path) == set()


def test_a_run_is_not_overwritten(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=1", "--out", out)[0] == 0
    before = weights_in(out)
    code, _, err = run_train("--data", photos, *RUN, "--steps=2", "--out", out)
    assert code == 2
    assert_one_line(err, f"--out {out} holds a run already", "--resume")
    assert weights_in(out) == before


def test_bad_data_is_one_line_and_exit_code_1(photos, tmp_path, run_train):
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.new("L", (8, 8)).save(mixed / "a.png")
    Image.new("L", (9, 7)).save(mixed / "b.png")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "c.png").write_bytes(b"no image")
    before = names(tmp_path)
    for data, parts in (
        (tmp_path / "empty", ["no images in", "empty"]),
        (mixed, ["a.png is 8x8", "b.png is 9x7"]),
        (damaged, ["c.png: not a readable image"]),
    ):
        code, out, err = run_train("--data", data, *RUN, "--steps=1", "--out", tmp_path / "run")
        assert (code, out) == (1, "")
        assert_one_line(err, "error: ", *parts)
        assert names(tmp_path) == before


def test_a_diverged_run_stops_and_keeps_its_last_checkpoint(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=2", "--out", out)[0] == 0
    before = {name: (out / name).read_bytes() for name in ("config.json", "model.safetensors", "training_state.pt")}
    code, stdout, err = run_train("--out", out, "--resume", "--steps=6", "--lr=1e30", "--device=cpu", "--quiet")
    assert (code, stdout) == (1, "")
    assert_one_line(err, "error: the loss became ", "lower --lr", f"{out} keeps the checkpoint of step 2")
    assert {name: (out / name).read_bytes() for name in before} == before
    assert names(out) == FILES | {"bad_steps.jsonl"}
    json.loads((out / "stats.jsonl").read_text().splitlines()[-1])


def test_a_run_that_diverges_at_once_leaves_no_checkpoint(photos, tmp_path, run_train):
    out = tmp_path / "run"
    code, _, err = run_train("--data", photos, *RUN, "--steps=6", "--lr=1e30", "--out", out)
    assert code == 1
    assert_one_line(err, "error: the loss became ", "(there is no checkpoint yet)")
    assert names(out) == {"train.json", "data.json", "bad_steps.jsonl"}


def test_a_gradient_that_is_not_finite_does_not_replace_the_last_checkpoint(photos, tmp_path, run_train, monkeypatch):
    clip, steps = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def overflow(parameters, largest):
        if next(steps) == 3:
            parameters[0].grad.view(-1)[0] = torch.inf
        return clip(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    out = tmp_path / "run"
    code, _, err = run_train("--data", photos, *RUN, "--save-every=1", "--steps=3", "--out", out)
    assert code == 1
    report = "error: the gradient's norm became inf at step 3 (loss "
    assert_one_line(err, report, f"gradient norm inf, images in {out}/bad_steps.jsonl", f"{out} keeps the checkpoint of step 2")
    assert UNet.from_pretrained(out).conv_in.weight.isfinite().all()
    (line,) = map(json.loads, (out / "bad_steps.jsonl").read_text().splitlines())
    assert line.pop("loss") > 0 and len(set(line.pop("images")) & set(range(8))) == 4
    assert line == {"step": 3, "grad_norm": "inf"}


def test_some_steps_that_are_not_finite_may_pass(photos, tmp_path, run_train, monkeypatch):
    backward = Trainer._backward
    start = ["--data", photos, *RUN, "--lr-schedule=constant", "--skip-bad-steps=2", "--save-every=2"]

    def spoilt(trainer, shared):
        return backward(trainer, shared) * (torch.nan if trainer.step in (1, 3, 6) else 1)

    monkeypatch.setattr(Trainer, "_backward", spoilt)
    out = tmp_path / "run"
    assert run_train(*start, "--steps=3", "--out", out)[::2] == (0, "")
    code, _, err = run_train("--out", out, "--resume", "--steps=9", "--device=cpu", "--quiet")
    assert code == 1
    assert_one_line(err, "error: the loss became nan at step 7 (loss nan", f"{out} keeps the checkpoint of step 6")
    assert [json.loads(line)["step"] for line in (out / "bad_steps.jsonl").read_text().splitlines()] == [2, 4, 7]
    stats = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in stats] == [2, 3, 4, 6]
    assert stats[2]["loss"] is None and all(0 < line["loss"] < 2 for line in (*stats[:2], stats[3]))  # step 4 had a line alone
    more = ["--out", out, "--resume", "--steps=9", "--device=cpu", "--quiet"]
    assert run_train(*more, "--skip-bad-steps=3")[::2] == (0, "")  # the third is met again, and counted once
    assert [json.loads(line)["step"] for line in (out / "bad_steps.jsonl").read_text().splitlines()] == [2, 4, 7]
    assert UNet.from_pretrained(out).conv_in.weight.isfinite().all()


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(photos, tmp_path, run_train, monkeypatch):
    out, values = tmp_path / "run", iter([3.0, 1.0, 2.0, 1.5, 0.5, 2.5])
    monkeypatch.setattr(Trainer, "validation_loss", lambda trainer: next(values))
    start = ["--data", photos, *RUN, "--lr-schedule=constant", "--val", photos / "class-0", "--save-every=1"]
    assert run_train(*start, "--steps=3", "--out", out)[0] == 0
    assert names(out / "best") == {"config.json", "model.safetensors", "validation.json"}
    record = json.loads((out / "best" / "validation.json").read_text())
    assert record == {"step": 2, "val_loss": 1.0, "data": str(photos / "class-0")}
    assert weights_in(out / "best") == weights_in(out / "checkpoints" / "0000002") != weights_in(out)
    stats = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [line["val_loss"] for line in stats] == [3.0, 1.0, 2.0]
    more = ["--out", out, "--resume", "--device=cpu", "--quiet"]
    for steps, val, best in ((4, [], 2), (5, [], 5), (6, ["--val", photos / "class-1"], 6)):  # the last on other images
        assert run_train(*more, f"--steps={steps}", *val)[::2] == (0, "")
        assert json.loads((out / "best" / "validation.json").read_text())["step"] == best
    assert weights_in(out / "best") == weights_in(out)
    assert not (out / "best.next").exists()


def test_validation_follows_the_training_and_does_not_change_it(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--class-conditional", "--ema=0.5", "--log-every=10", "--save-every=4", "--steps=12"]
    assert run_train(*start, "--val", photos, "--out", tmp_path / "run")[::2] == (0, "")
    assert run_train(*start, "--out", tmp_path / "without")[0] == 0
    assert weights_in(tmp_path / "run") == weights_in(tmp_path / "without")
    stats = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in stats] == [4, 8, 10, 12]
    first, second, none, last = (line.get("val_loss") for line in stats)
    assert first > second > last > 0 and none is None
    assert Sampler(tmp_path / "run" / "best", steps=2).sample(seeds=[0], labels=[1]).isfinite().all()


def test_held_out_images_without_the_classes_of_the_data_are_refused(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--class-conditional", "--val", photos / "class-0", "--steps=1"]
    code, _, err = run_train(*start, "--out", tmp_path / "run")
    assert code == 2
    assert_one_line(err, "--val:", "class-0 has no label for every image", "the classes of --data")


def test_damage_found_on_resuming_is_one_line_and_exit_code_1(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=1", "--out", out)[0] == 0
    resume = ["--out", out, "--resume", "--steps=2", "--device=cpu", "--quiet"]
    (out / "training_state.pt").write_bytes(b"garbage")
    code, _, err = run_train(*resume)
    assert code == 1
    assert_one_line(err, "error: ", "training_state.pt: not a whole training state")
    for content in ("{", "[1]"):
        (out / "train.json").write_text(content)
        code, _, err = run_train(*resume)
        assert code == 1
        assert_one_line(err, "error: ", "train.json: not the record of a run")


def test_the_checkpoint_before_a_damaged_one_is_taken(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--lr-schedule=constant", "--save-every=2"]
    for name, steps in (("whole", 8), ("parts", 6)):
        assert run_train(*start, "--keep=3", f"--steps={steps}", "--out", tmp_path / name)[0] == 0
    out = tmp_path / "parts"
    assert names(out / "checkpoints") == {"0000002", "0000004"}
    assert UNet.from_pretrained(out / "checkpoints" / "0000004").config.level_channels == (8, 16)
    data = bytearray((out / "training_state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "training_state.pt").write_bytes(data)
    code, _, err = run_train("--out", out, "--resume", "--steps=8", "--device=cpu", "--quiet")
    assert code == 0
    assert_one_line(err, "warning: ", f"{out}/training_state.pt: not a whole training state", "before, of step 4")
    assert weights_in(out) == weights_in(tmp_path / "whole") and names(out / "checkpoints") == {"0000004", "0000006"}
    steps = [json.loads(line)["step"] for line in (out / "stats.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]
    assert run_train("--out", out, "--resume", "--keep=1", "--steps=9", "--device=cpu", "--quiet")[0] == 0
    assert names(out / "checkpoints") == set()


def test_weights_that_are_not_those_of_the_training_state_are_written_anew(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=2", "--out", out)[0] == 0
    weights = weights_in(out)
    for damaged in (b"", weights[:-1] + bytes([weights[-1] ^ 1])):
        (out / "model.safetensors").write_bytes(damaged)
        assert run_train("--out", out, "--resume", "--device=cpu", "--quiet")[::2] == (0, "")
        assert weights_in(out) == weights


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(photos, tmp_path, run_train):
    out = tmp_path / "run"
    assert run_train("--data", photos, *RUN, "--steps=6", "--lr=1e30", "--out", out)[0] == 1
    code, stdout, err = run_train("--out", out, "--resume", "--steps=2", "--lr=1e-3", "--device=cpu", "--quiet")
    assert (code, err) == (0, "") and "trained to step 2" in stdout
    assert run_train("--data", photos, *RUN, "--steps=2", "--out", tmp_path / "fresh")[0] == 0
    assert weights_in(out) == weights_in(tmp_path / "fresh")


def test_drawing_samples_does_not_change_the_training(photos, tmp_path, run_train):
    start = ["--data", photos, *RUN, "--set", *NETWORK[2:], "dropout=0.2", "--steps=4"]
    assert run_train(*start, "--out", tmp_path / "a")[0] == 0
    assert run_train(*start, "--sample-every=1", "--save-every=1", "--out", tmp_path / "b")[0] == 0
    assert names(tmp_path / "b" / "samples") == {f"000000{i}.png" for i in (1, 2, 3, 4)}
    assert weights_in(tmp_path / "a") == weights_in(tmp_path / "b")


def test_the_command_sets_its_own_seed(photos, tmp_path, run_train):
    for name, seed, torch_seed in (("a", 1, 10), ("b", 1, 20), ("c", 2, 10)):
        torch.manual_seed(torch_seed)
        assert run_train("--data", photos, *RUN, "--steps=1", "--seed", seed, "--out", tmp_path / name)[0] == 0
    assert weights_in(tmp_path / "a") == weights_in(tmp_path / "b") != weights_in(tmp_path / "c")


def test_a_run_of_the_version_before_called_its_dtype_precision(photos, tmp_path, run_train):
    out, record = tmp_path / "run", tmp_path / "run" / "train.json"
    former = ["fp32" if word == "--dtype=float32" else word for word in RUN]
    former.insert(former.index("fp32"), "--precision")
    code, _, err = run_train("--data", photos, *former, "--steps=1", "--out", out)
    assert (code, err) == (0, "warning: --precision fp32 is now --dtype float32\n")
    values = json.loads(record.read_text())
    assert values.pop("dtype") == "float32"
    record.write_text(json.dumps({**values, "precision": "bf16"}))
    assert run_train("--out", out, "--resume", "--steps=2", "--device=cpu", "--quiet")[::2] == (0, "")
    values = json.loads(record.read_text())
    assert values["dtype"] == "bfloat16" and "precision" not in values
    record.write_text(json.dumps({**values, "precision": ["fp32"]}))
    code, _, err = run_train("--out", out, "--resume", "--steps=3", "--device=cpu", "--quiet")
    assert code == 1
    assert_one_line(err, "error: ", "train.json: not the record of a run")
    assert "--precision" not in run_train("--help")[1]


def test_a_recipe_is_the_default_of_options_and_is_kept(photos, tmp_path, run_train):
    base = ["--data", photos, *NETWORK, "--batch-size=4", "--dtype=float32", "--device=cpu", "--quiet"]
    out = tmp_path / "fast"
    assert run_train(*base, "--recipe=fast", "--steps=2", "--ema=0.5", "--out", out)[0] == 0
    record = json.loads((out / "train.json").read_text())
    assert (record["recipe"], record["steps"], record["ema"]) == ("fast", 2, 0.5)
    assert (record["lr"], record["lr_schedule"], record["min_snr_gamma"]) == (5e-4, "cosine", 20.0)
    assert UNet.from_pretrained(out).config.prediction_type == "v_prediction"
    assert run_train("--out", out, "--resume", "--steps=3", "--device=cpu", "--quiet")[0] == 0
    assert json.loads((out / "train.json").read_text())["min_snr_gamma"] == 20.0

    plain = tmp_path / "plain"
    assert run_train(*base, "--steps=1", "--out", plain)[0] == 0
    record = json.loads((plain / "train.json").read_text())
    assert (record["recipe"], record["lr"], record["warmup"], record["ema"]) == ("ddpm", 2e-4, 5000, 0.9999)
    assert record["prediction_type"] is None and record["min_snr_gamma"] is None
    code, _, err = run_train("--out", plain, "--resume", "--recipe=fast", "--steps=2", "--device=cpu")
    assert code == 2
    assert_one_line(err, "--recipe fast", "its own")


def test_training_begins_with_another_models_weights(photos, tmp_path, run_train):
    run_train(*RUN, "--data", photos, "--class-conditional", "--steps=3", "--out", tmp_path / "before")
    before = UNet.from_pretrained(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "init")
    options = ["--init", tmp_path / "init", "--data", photos, *RUN[len(NETWORK) :]]
    options += ["--recipe=fast", "--lr=1e-9", "--dropout=0.2"]
    assert run_train(*options, "--steps=1", "--out", tmp_path / "after")[0] == 0
    after = UNet.from_pretrained(tmp_path / "after")
    assert after.config == dataclasses.replace(before.config, dropout=0.2)  # not v-prediction, which the recipe would be
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-8, rtol=0)

    shutil.rmtree(tmp_path / "init")  # a run that goes on needs it no more
    code, _, err = run_train("--resume", "--steps=3", "--out", tmp_path / "after", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "after" / "stats.jsonl").read_text().splitlines()[-1])["step"] == 3


@pytest.mark.parametrize(
    "options,parts",
    [
        (["--preset=celeba-64"], ["--preset describes a network"]),
        (["--set", "base_channels=8"], ["--set base_channels describes a network"]),
        (["--set", "sample_size=48"], ["--set sample_size: --init fashion-mnist has 32", "double", "got 48"]),
        (["--set", "sample_size=large"], ["--set sample_size: --init fashion-mnist has 32", "got large"]),
        (["--init=spoken-digits", "--set", "sample_size=32"], ["--set sample_size: --init spoken-digits has 16", "pictures"]),
        (["--prediction-type=sample"], ["--prediction-type describes"]),
        (["--class-conditional"], ["--class-conditional describes"]),
        (["--init=nowhere"], ["unknown model 'nowhere'", "fashion-mnist"]),
    ],
)
def test_a_network_is_not_described_twice(options, parts, photos, tmp_path, run_train):
    code, _, err = run_train("--init=fashion-mnist", *options, "--data", photos, "--out", tmp_path / "run")
    assert code == 2
    assert_one_line(err, *parts)
    assert not (tmp_path / "run").exists()


def test_a_class_conditional_model_goes_on_without_classes_where_the_data_has_none(photos, tmp_path, run_train):
    run_train(*RUN, "--data", photos, "--class-conditional", "--steps=3", "--out", tmp_path / "init")
    before = UNet.from_pretrained(tmp_path / "init")
    options = ["--init", tmp_path / "init", "--data", photos / "class-0", *RUN[len(NETWORK) :], "--lr=1e-9"]
    code, _, err = run_train(*options, "--steps=1", "--out", tmp_path / "after")
    assert code == 0
    assert_one_line(err, f"{photos / 'class-0'} has no label for every image", "continues without classes")
    after = UNet.from_pretrained(tmp_path / "after")
    assert after.config == dataclasses.replace(before.config, num_classes=None, class_names=None)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 700])
    with torch.no_grad():
        torch.testing.assert_close(after(x, t), before(x, t), atol=1e-6, rtol=0)  # no label is the null class
        assert not torch.allclose(after(x, t), before(x, t, torch.tensor([0, 1])), atol=1e-6)

    shutil.rmtree(tmp_path / "init")
    code, _, err = run_train("--resume", "--steps=2", "--out", tmp_path / "after", "--quiet")
    assert (code, err) == (0, "")


def test_a_model_grows_by_a_level_for_images_twice_as_large(photos, tmp_path, run_train):
    for file in photos.glob("*/*.png"):
        Image.open(file).resize((16, 16)).save(file)
    run_train(*RUN, "--data", photos, "--steps=3", "--out", tmp_path / "init")
    before = UNet.from_pretrained(tmp_path / "init")
    options = ["--init", tmp_path / "init", "--data", photos, "--set", "sample_size=16", *RUN[len(NETWORK) :]]
    for torch_seed, out in ((1, "again"), (2, "after")):
        torch.manual_seed(torch_seed)
        assert run_train(*options, "--lr=1e-9", "--steps=1", "--out", tmp_path / out)[0] == 0
    assert weights_in(tmp_path / "again") == weights_in(tmp_path / "after")
    after = UNet.from_pretrained(tmp_path / "after")
    assert after.config == dataclasses.replace(before.config, sample_size=16, channel_multipliers=(1, 1, 2))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([5, 700])
    with torch.no_grad():
        halved = torch.nn.functional.avg_pool2d(after(x, t), 2)
        torch.testing.assert_close(halved, before(x[..., 1::2, 1::2], t), atol=1e-6, rtol=0)

    shutil.rmtree(tmp_path / "init")
    code, _, err = run_train("--resume", "--steps=2", "--out", tmp_path / "after", "--quiet")
    assert (code, err) == (0, "")
    assert UNet.from_pretrained(tmp_path / "after").config == after.config


def test_training_goes_on_from_a_widened_network(photos, tmp_path, run_train):
    options = ["--data", photos, *RUN[len(NETWORK) :], "--log-every=1"]
    run_train(*options, *NETWORK, "--class-conditional", "--steps=3", "--out", tmp_path / "narrow")
    narrow = UNet.from_pretrained(tmp_path / "narrow")
    widen(narrow, dataclasses.replace(narrow.config, base_channels=16)).save_pretrained(tmp_path / "wide")
    for name in ("narrow", "wide"):
        code, _, err = run_train(*options, "--init", tmp_path / name, "--steps=4", "--out", tmp_path / f"after-{name}")
        assert (code, err) == (0, "")
    before, after = (json.loads((tmp_path / f"after-{n}/stats.jsonl").read_text().splitlines()[0]) for n in ("narrow", "wide"))
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    trained = torch.load(tmp_path / "after-wide/training_state.pt", weights_only=True)["model"]
    assert trained["conv_in.weight"].shape == (16, 1, 3, 3)
    start = UNet.from_pretrained(tmp_path / "wide").state_dict()
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "mid_block.attentions.0.to_v.weight"):
        moved = trained[name] - start[name]
        assert (moved[::2] - moved[1::2]).norm() > 0.1 * moved.norm() > 0
