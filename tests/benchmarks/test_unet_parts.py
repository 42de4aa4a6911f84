import json

import pytest
import torch
from gpu import unet_parts

from ddim_fast import UNet, UNetConfig


def row(operator="add_bias", ratio=1.2, microseconds=10.0, calls=1):
    kind = {"dtype": "bfloat16", "memory format": "channels_last", "compute capability": "sm_90"}
    return {"operator": operator, **kind, "ratio": ratio, "microseconds": microseconds, "calls": calls}


def test_what_is_faster_together_and_slower_nowhere_is_chosen():
    kind = ("add_bias", "sm_90", "bfloat16", "channels_last")
    assert unet_parts.faster([row(), row(ratio=0.96)]) == {kind}
    assert not unet_parts.faster([row(ratio=1.5), row(ratio=0.9)])  # slower at a shape
    assert not unet_parts.faster([row(ratio=1.1), row(ratio=0.96, calls=9)])  # and in all calls together
    assert not unet_parts.faster([row("evaluation")]) and not unet_parts.faster([])


@pytest.mark.slow
def test_it_runs_in_the_interpreter(monkeypatch, capsys, tmp_path, randomise):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tried on the CPU")
    config = UNetConfig(
        sample_size=8, base_channels=64, channel_multipliers=(1, 1), layers_per_block=1, attention_resolutions=(4,)
    )
    model = randomise(UNet(config))
    monkeypatch.setattr(unet_parts, "network", lambda name: model)
    monkeypatch.setattr("every_cpu.TURNS", 1)
    monkeypatch.setattr("every_cpu.SECONDS", 0.0)
    out = tmp_path / "parts.json"
    monkeypatch.setattr("sys.argv", ["unet_parts.py", "--batch", "2", "--dtype", "float32", "--out", str(out)])
    unet_parts.main()
    rows = json.loads(out.read_text())["rows"]
    assert {r["operator"] for r in rows} == {*unet_parts.OPERATORS, "evaluation"}
    sets = ["none", "add_bias", "conv3x3_enlarged", "downsample", "all"]
    assert [r["with"] for r in rows if r["operator"] == "evaluation"] == sets
    assert "For FASTER_ON_GPU in ddim_fast/ops/measured.py:" in capsys.readouterr().out
