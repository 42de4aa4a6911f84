"""Stages of a run: export --to stage, and training from one."""

import json

import pytest
import torch
from PIL import Image

from ddim_fast import UNet, export, train
from tests.helpers.small_runs import NETWORK, RUN, assert_one_line


@pytest.fixture
def photos(here):
    folder = here / "photos"
    for i in range(8):
        (folder / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(folder / f"class-{i % 2}" / f"{i}.png")
    return folder


@pytest.fixture
def stage(photos, here, run_here):
    """A stage, in bfloat16 and small files, of a run of two steps, whose averaged weights are not its raw ones."""
    options = [*RUN, "--class-conditional", "--steps=2", "--lr=0.01", "--ema=0.9"]
    assert run_here(train, "--data", photos, *options, "--out", here / "run")[0] == 0
    smaller = ["--dtype", "bfloat16", "--max-shard-size", "10KB"]
    code, said, err = run_here(export, "--to", "stage", "--model", here / "run", *smaller, "--out", here / "stage")
    assert (code, err) == (0, "") and "--init stage/raw" in said.replace(f"{here}/", "")
    return here / "stage"


def test_a_stage_has_the_averaged_and_the_raw_weights(stage, here):
    state = torch.load(here / "run" / "training_state.pt", weights_only=True)
    for name, key in (("raw", "model"), ("averaged", "ema")):
        stored = UNet.from_pretrained(stage / name).state_dict()
        assert all(torch.equal(stored[k], weight.bfloat16().float()) for k, weight in state[key].items())
        shards = list((stage / name).glob("model-*.safetensors"))
        assert len(shards) > 1 and max(path.stat().st_size for path in shards) < 20_000
        assert UNet.from_pretrained(stage / name).config.class_names == ("class-0", "class-1")
    assert any(not torch.equal(state["model"][k].bfloat16(), state["ema"][k].bfloat16()) for k in state["ema"])
    record = json.loads((stage / "stage.json").read_text())
    assert (record["step"], record["images"], record["options"]["ema"]) == (2, 8, 0.9)
    assert {path.name for path in stage.iterdir()} == {"raw", "averaged", "stage.json"}


def test_training_goes_on_from_a_stage(stage, photos, here, run_here):
    before = torch.load(here / "run" / "training_state.pt", weights_only=True)["model"]
    options = [*RUN[len(NETWORK) :], "--steps=1", "--lr=1e-9"]
    assert run_here(train, "--init", stage / "raw", "--data", photos, *options, "--out", here / "next")[0] == 0
    after = torch.load(here / "next" / "training_state.pt", weights_only=True)["model"]
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight.bfloat16().float(), atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    "options,parts",
    [
        (["--model=cifar10-64"], ["--model cifar10-64", "has no training_state.pt", "a run of ddim_fast.train has raw"]),
        (["--model=run", "--class=1"], ["--class 1: a stage keeps all classes of its run"]),
        (["--model=run", "--dtype=int8"], ["--dtype int8 is for --to onnx"]),
        (["--model=run", "--ema-length=0.1"], ["--ema-length is an option of --to checkpoint"]),
    ],
)
def test_what_is_no_stage_is_a_usage_error(options, parts, run_here, here):
    code, _, err = run_here(export, "--to", "stage", *options, "--out", here / "stage")
    assert code == 2 and not (here / "stage").exists()
    assert_one_line(err, *parts)


def test_a_damaged_training_state_is_one_line(stage, run_here, here):
    torch.save({"step": 2}, here / "run" / "training_state.pt")
    code, _, err = run_here(export, "--to", "stage", "--model", here / "run", "--out", here / "other")
    assert code == 1 and not (here / "other").exists()
    assert_one_line(err, "training_state.pt: not a whole training state")
