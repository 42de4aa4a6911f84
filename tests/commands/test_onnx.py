"""export --to onnx, and sample --engine onnx."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddim_fast import export, sample

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint and its export, by the command; exporting takes seconds."""
    import torch

    from ddim_fast import UNet, UNetConfig

    place = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    fields = {"channel_multipliers": (1,), "layers_per_block": 1, "attention_resolutions": (), "norm_num_groups": 4}
    names = tuple(f"kind {i}" for i in range(10))
    model = UNet(UNetConfig(sample_size=8, base_channels=8, num_classes=10, class_names=names, **fields))
    torch.nn.init.normal_(model.conv_out.weight, std=0.05)
    model.save_pretrained(place / "checkpoint")
    command = [
        sys.executable,
        "-m",
        "ddim_fast.export",
        "--to",
        "onnx",
        "--model",
        place / "checkpoint",
        "--out",
        place / "onnx",
    ]
    command += ["--steps", 3, "--eta", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"wrote {place / 'onnx'}; python -m ddim_fast.sample --engine onnx --model {place / 'onnx'} samples from it\n"
    )
    return place


def pictures(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("0*.png")}


def test_the_folder_describes_itself(exported):
    names = {p.name for p in (exported / "onnx").iterdir()}
    assert names == {"README.md", "SHA256SUMS", "config.json", "sampler.onnx", "schedule.json", "unet.onnx"}
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=exported / "onnx").returncode == 0
    schedule = json.loads((exported / "onnx" / "schedule.json").read_bytes())
    assert schedule["timesteps"] == [999, 249, 0] and np.shape(schedule["coefficients"]) == (3, 7)
    assert schedule["settings"] == {"steps": 3, "eta": 1.0, "spacing": "quadratic", "solver": "ddim", "clip": None}
    card = (exported / "onnx" / "README.md").read_text()
    assert "\nThe classes, from 0: kind 0, kind 1, " in card and ", kind 9.\n" in card
    assert "--to onnx" in card and "onnxscript" in card and "| `x_T` | (M, 3, 8, 8) float32 |" in card


_REQUESTS = [
    [],
    ["--class", "kind 3,7"],
    ["--steps", 2, "--eta", 0, "--solver", "unipc"],
    ["--guidance", 2],
    ["--spacing", "999,500,250,0", "--eta", 1],
]


@pytest.mark.parametrize("options", _REQUESTS, ids=str)
def test_the_images_are_those_of_torch(options, run_here, exported, tmp_path):
    request = ["--seeds", "0-4", "--batch-size", 2]
    code, out, err = run_here(
        sample, "--engine", "onnx", "--model", exported / "onnx", *request, *options, "--out", tmp_path / "o"
    )
    assert code == 0 and "5 images of" in out and ", onnx, float32: " in out and "5/5 images" in err
    as_exported = [] if {"--steps", "--spacing"} & {*options} else ["--steps", 3, "--eta", 1]
    code, _, err = run_here(
        sample, "--model", exported / "checkpoint", *request, *as_exported, *options, "--out", tmp_path / "t", "--quiet"
    )
    assert (code, err) == (0, "")
    found, expected = pictures(tmp_path / "o"), pictures(tmp_path / "t")
    assert found.keys() == expected.keys() and len(found) == 5
    assert max(np.abs(found[name] - expected[name]).max() for name in found) <= 1


def test_jobs_films_and_archives_are_made_as_with_torch(run_here, exported, tmp_path):
    options = ["--engine", "onnx", "--model", exported / "onnx", "--num-images", 5, "--batch-size", 2]
    assert run_here(sample, *options, "--out", tmp_path / "a.npz", "--trajectory", tmp_path / "a.gif", "--quiet") == (0, "", "")
    with np.load(tmp_path / "a.npz") as npz:
        assert npz["arr_0"].shape == (5, 8, 8, 3) and npz["arr_1"].tolist() == [0, 1, 2, 3, 4]
    assert Image.open(tmp_path / "a.gif").n_frames >= 2  # equal ones are joined
    code, out, _ = run_here(sample, *options, "--out", tmp_path / "a.npz")
    assert code == 0 and "is finished" in out
    code, _, err = run_here(sample, *options, "--out", tmp_path / "a.npz", "--steps", 2)
    assert code == 2 and "--steps 3, not 2" in err


def test_it_runs_without_torch(exported, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed')")
    command = [sys.executable, "-m", "ddim_fast.sample", "--engine", "onnx", "--model", exported / "onnx", "--seeds", "0-2"]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "out"), "--quiet"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(pictures(tmp_path / "out")) == 3


def test_where_torch_is_missing_the_other_engines_say_so(run_here, exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = run_here(sample, "--model", exported / "checkpoint")
    assert (code, out, err) == (1, "", "error: torch is not installed; --engine onnx and --engine plan sample without it\n")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--provider", "tpu"], "provider 'tpu' is not there"),
        (["--compile"], "--compile is not an option of --engine onnx"),
        (["--dtype", "int8"], "--dtype is not an option of --engine onnx"),
        (["--device", "cpu"], "--device is not an option of --engine onnx"),
        (["--tolerance", "0.1"], "--tolerance is not an option of --engine onnx"),
        (["--reuse", "2"], "--reuse is not an option of --engine onnx"),
        (["--class", "10"], "class 10 is out of range"),
        (["--class", "kind"], "--class: no class is called 'kind'; did you mean 'kind"),
        (["--steps", "0"], "steps must be a whole number"),
        (["--model", "nonesuch"], "unknown model 'nonesuch'"),
        (["--engine", "eager", "--provider", "cpu"], "--provider needs --engine onnx"),
    ],
    ids=str,
)
def test_a_wrong_option_of_sample_is_one_line_and_exit_code_2(arguments, message, run_here, exported):
    model = "checkpoint" if "eager" in arguments else "onnx"
    code, out, err = run_here(sample, "--engine", "onnx", "--model", exported / model, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--opset", "7"], "opset must be from 18 to 23"),
        (["--dtype", "bfloat16", "--optimize", "cuda"], "for float32 and float16"),
        (["--steps", "0"], "steps must be a whole number"),
        (["--spacing", "5,3", "--eta", "2"], "eta must lie in [0, 1]"),
        (["--to", "diffusers", "--steps", "7"], "--steps is an option of --to onnx"),
        (["--out", "."], "--out . is not empty (kept)"),
    ],
    ids=str,
)
def test_a_wrong_option_of_export_is_one_line_and_exit_code_2(arguments, message, run_here, exported, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").write_text("")
    code, out, err = run_here(export, "--to", "onnx", "--model", exported / "checkpoint", "--out", "out", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["kept"]


def test_a_damaged_export_is_one_line_and_exit_code_1(run_here, exported, tmp_path):
    folder = shutil.copytree(exported / "onnx", tmp_path / "onnx")
    (folder / "sampler.onnx").write_bytes((folder / "sampler.onnx").read_bytes()[:-10])
    code, out, err = run_here(sample, "--engine", "onnx", "--model", folder, "--quiet")
    assert code == 1 and "sampler.onnx: damaged or changed" in err and err.count("\n") == 1 and out == ""
    assert not list((tmp_path / "here").iterdir())


def test_without_the_packages_exporting_says_what_is_missing(run_here, exported, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ddim_fast.deploy.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = run_here(export, "--to", "onnx", "--model", exported / "checkpoint", "--out", tmp_path / "out")
    assert code == 1 and "exporting to ONNX needs onnx: pip install 'ddim_fast[onnx]'" in err and err.count("\n") == 1


def test_engines_are_those_that_there_are():
    from ddim_fast.engine import ENGINES

    assert (*ENGINES, "onnx", "plan") == sample._ENGINES
    from ddim_fast.deploy.onnx_export import DTYPES

    assert DTYPES == export._DTYPES
