"""The scripts of benchmarks/gpu, rehearsed on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import UNet, UNetConfig
from ddim_fast.evaluation.inception import FEATURES, NAME, Inception
from ddim_fast.models.weights import write_safetensors

SLOTS = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def slot(tmp_path):
    """A function rehearsing a slot; keywords are its variables -> its exit code and stdout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(number, **variables):
        environment = {
            # pytest-benchmark, in the slot, would take itself for a worker of pytest-xdist, and measure nothing.
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
            "PATH": path,
            "TINY": "1",
            "SLOT_SECONDS": "1500",
            "WORK": str(tmp_path / "work"),
            **variables,
        }
        command = ["bash", SLOTS / f"slot_{number}.sh", tmp_path / "out"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        return result.returncode, result.stdout

    return run


@pytest.fixture
def inputs(tmp_path):
    """The variables of a slot that trains: a tiny network and data set, and a feature network of random weights."""
    torch.manual_seed(0)
    fields = {"base_channels": 16, "channel_multipliers": (1, 2), "layers_per_block": 1, "norm_num_groups": 4}
    config = UNetConfig(sample_size=32, num_classes=10, prediction_type="v_prediction", **fields)
    UNet(config).save_pretrained(tmp_path / "start")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)):
        (tmp_path / "data" / f"class-{i}").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / f"class-{i}" / "0.png")
    (tmp_path / "inception").mkdir()
    write_safetensors(tmp_path / "inception" / f"{NAME}.safetensors", Inception().state_dict())
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    return {
        "START": str(tmp_path / "start"),
        "DATA": str(tmp_path / "data"),
        "REFERENCE": str(tmp_path / "statistics.npz"),
        "INCEPTION": f"random={tmp_path / 'inception'}",
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stage_is_trained_measured_and_given_in_parts(slot, inputs, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    code, said = slot(2, SLOT_SECONDS="4", **inputs)
    assert code == 1 and "begin: no time is left; a rerun goes on with it" in said
    code, said = slot(2, **inputs)
    assert code == 0, said + (out / "log.txt").read_text()
    rows = json.loads((out / "evaluation.json").read_text())["rows"]
    assert [row["settings"]["solver"] for row in rows] == ["ddim", "unipc"] and all("FID-4" in row for row in rows)
    losses = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5]
    for name in ("averaged", "raw"):
        with tarfile.open(out / f"{name}.tar.00") as archive:
            archive.extractall(tmp_path / "joined", filter="data")
        joined, kept = (UNet.from_pretrained(folder / name).state_dict() for folder in (tmp_path / "joined", work / "stage"))
        assert all(torch.equal(tensor, kept[key]) for key, tensor in joined.items())

    shutil.rmtree(out)  # as where each call begins with an empty folder
    code, said = slot(2, **inputs)
    assert code == 0 and re.fullmatch(r"parts of the stage left to give: 0\ngiven: 4 files, 0\.\d MiB\n", said)
    assert (out / "evaluation.json").is_file() and not list(out.glob("*.tar.*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_of_two_steps_is_trained_and_measured(slot, inputs, tmp_path):
    code, said = slot(7, **inputs)
    assert code == 0, said + (tmp_path / "out" / "log.txt").read_text()
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [row["settings"]["timesteps"] for row in rows] == [[999], [999, 400]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_operators_tables_are_made(slot, tmp_path):
    code, said = slot(3)
    assert code == 0, said + (tmp_path / "out" / "log.txt").read_text()
    table = (tmp_path / "out" / "tables.md").read_text()
    assert all(name in table for name in ("attention", "group_norm_silu", "ddim_step"))
    assert all((tmp_path / "out" / f"{name}.json").is_file() for name in ("attention", "group_norm_silu", "ddim_step"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_runs_are_timed_after_the_tests(slot, tmp_path):
    code, said = slot(1)
    assert "tests: exit status 0" in said and "sampler-1: exit status 0" in said, (tmp_path / "out" / "log.txt").read_text()
    assert code == int("memcheck: exit status 0" not in said)  # the tool is a GPU's
    (timed,) = json.loads((tmp_path / "out" / "sampler-1.json").read_text())["benchmarks"]
    assert list(timed["extra_info"]["images/s"]) == ["eager bf16"]


@pytest.mark.parametrize("results,at_a_time", [(2, 4), (5, 3)])
def test_parts_and_results_are_at_most_eight_files(tmp_path, results, at_a_time):
    for folder in ("given", "parts", "results"):
        (tmp_path / "work" / folder).mkdir(parents=True)
    names = [f"{name}.tar.0{i}" for name in ("averaged", "raw") for i in range(3)]
    for name in names:
        (tmp_path / "work" / "parts" / name).write_bytes(bytes(2**19))
    for i in range(results):
        (tmp_path / "work" / "results" / f"{i}.json").touch()
    for given, left in ((names[:at_a_time], 6 - at_a_time), (names[at_a_time:], 0), ([], 0)):
        command = ["bash", "-c", f"source {SLOTS / 'lib.sh'}; give_parts; give", "slot", tmp_path / "out"]
        environment = {**os.environ, "WORK": str(tmp_path / "work")}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        size = f"given: {len(given)} files, {len(given) / 2:.1f} MiB"
        assert result.stdout == f"parts of the stage left to give: {left}\n{size}\n"
        assert sorted(path.name for path in (tmp_path / "out").glob("*.tar.*")) == given
        assert len(list((tmp_path / "out").iterdir())) == results + len(given) <= 8
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("which,room", [(0, 57), (1, 24)])  # MiB: of two files of CIFAR-10, and of two parts of a stage
def test_what_travels_with_a_command_leaves_room_for_data(which, room):
    root = SLOTS.parents[1]
    if not (root / ".git").exists():
        pytest.skip("no git checkout")
    line = re.findall(r"git sparse-checkout set .*", (SLOTS / "README.md").read_text())[which]
    left_out = [f":(exclude,glob){path}{'**' if path.endswith('/') else ''}" for path in re.findall(r"'!/([^']+)'", line)]
    command = ["git", "ls-files", "-z", ".", *left_out]
    files = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    size = sum((root / file).stat().st_size for file in files if (root / file).is_file())
    assert left_out and size / 2**20 + room < 64
