"""The scripts that kill jobs and that run for long: they find what is wrong, and sound jobs pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch


@pytest.fixture
def whole(tmp_path):
    """The folder of a finished training, as far as it is compared."""
    folder = tmp_path / "whole"
    (folder / "samples").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "samples/0000004.png", "samples/0000008.png"):
        (folder / name).write_bytes(name.encode())
    torch.save({"step": 8, "model": {"weight": torch.zeros(3)}}, folder / "training_state.pt")
    (folder / "stats.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6, 8)))
    return folder


def another_state(folder):
    torch.save({"step": 8, "model": {"weight": torch.tensor([0, 0, 1e-9])}}, folder / "training_state.pt")


@pytest.mark.parametrize(
    "change,faults",
    [
        (lambda folder: None, []),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"other"), ["model.safetensors is another one"]),
        (lambda folder: (folder / "samples/0000008.png").write_bytes(b"other"), ["samples/0000008.png is another one"]),
        (lambda folder: (folder / ".model.safetensors.abcd1234").touch(), [".model.safetensors.abcd1234 is stray"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json is missing"]),
        (lambda folder: (folder / "samples/0000004.png").unlink(), ["samples/0000004.png is missing"]),
        (lambda folder: (folder / "stats.jsonl").write_text('{"step": 6}\n'), ["stats.jsonl has the steps [6]"]),
        (another_state, ["training_state.pt differs in /model/weight"]),
    ],
)
def test_a_result_that_is_another_one_is_found(change, faults, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "job")
    change(tmp_path / "job")
    findings = kills.Findings()
    kills.compare(tmp_path / "job", whole, findings)
    assert findings.faults == [f"job: {fault}" for fault in faults]


@pytest.mark.slow
@pytest.mark.parametrize("module,options", [("kills", ["--share=0.02"]), ("soak", ["--minutes=0.01"])])
def test_sound_jobs_pass(module, options, tmp_path):
    command = [sys.executable, Path(kills.__file__).with_name(f"{module}.py"), *options, "--out", tmp_path / "r.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    if module == "soak":
        assert found["wrong"] == 0 and found["rounds"] >= 1
    else:
        assert found["cases"].keys() == {*kills.CASES, *kills.PAIRS} and found["cases"]["train-sigkill"]["kills"] == 4
