"""The scripts of examples/faces, on a few tiny pictures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import train
from ddim_fast.cli.parser import run_command
from ddim_fast.evaluation.inception import FeatureNetwork

EXAMPLE = Path(__file__).parents[1] / "examples" / "faces"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def faces(tmp_path):
    """The first thirty pictures of a data set, 8x8, of which the example holds out 0, 13, 23 and 29."""
    (tmp_path / "faces").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "faces" / f"{i:02d}.png")
    return tmp_path / "faces"


@pytest.fixture
def data(faces, tmp_path, monkeypatch):
    """They, split."""
    split = load("split")
    monkeypatch.setattr(split, "PICTURES", 30)
    split.main(str(faces), "8", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """A run of two steps."""
    network = ["sample_size=8", "base_channels=16", "channel_multipliers=[1]", "layers_per_block=1", "norm_num_groups=4"]
    options = ["--preset=cifar10-64", "--batch-size=4", "--steps=2", "--device=cpu", "--dtype=float32", "--quiet"]
    command = ["train", "--data", data / "train", *options, "--out", tmp_path / "run", "--set", *network]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with pytest.raises(SystemExit) as stop:
        run_command(train.main)
    assert stop.value.code == 0


def test_people_held_out_are_not_trained_on(faces, data, tmp_path):
    held_out = {"0000.png", "0013.png", "0023.png", "0029.png"}
    assert {p.name for p in (data / "held-out").iterdir()} == held_out
    assert {p.name for p in (data / "train").iterdir()} == {f"{i:04d}.png" for i in range(30)} - held_out
    assert np.array_equal(Image.open(data / "held-out" / "0013.png"), Image.open(faces / "13.png"))
    with pytest.raises(SystemExit, match=r"holds 30 pictures; held-out\.txt is about 5999"):
        load("split").main(str(faces), "8", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_twenty_people_of_thirty_pictures_are_held_out():
    numbers = list(map(int, (EXAMPLE / "held-out.txt").read_text().split()))
    assert len(numbers) == len(set(numbers)) == 600 and min(numbers) >= 0 and max(numbers) < load("split").PICTURES


def test_the_nearest_pictures_are_shown(run, data, tmp_path, monkeypatch, capsys):
    nearest = load("nearest")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    monkeypatch.setattr(nearest, "load_inception", lambda path: FeatureNetwork(layers, "tiny", 6, size=8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copies = [np.asarray(Image.open(data / "train" / f"{i:04d}.png")) for i in (1, 2, 3, 4)] * 4
    samples = torch.from_numpy(np.stack(copies)).permute(0, 3, 1, 2) / 127.5 - 1
    monkeypatch.setattr(nearest.Sampler, "sample", lambda self, seeds: samples)
    arguments = [tmp_path / "run", data / "train", data / "held-out", "inception", tmp_path / "nearest.png"]
    nearest.main(*map(str, arguments))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("distance to the nearest training picture, samples: median 0.0")
    assert "held-out pictures: median" in lines[1] and not lines[1].endswith("least 0.00")
    sheet = np.asarray(Image.open(tmp_path / "nearest.png"))[::16, ::16]
    assert np.array_equal(sheet[2:10], sheet[12:20])  # the first eight samples, and the pictures that they copy
