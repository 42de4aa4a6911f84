import json

import pytest
import torch
from gpu import tune

from ddim_fast import UNet, UNetConfig
from ddim_fast.kernels import group_norm_tiles


def rows(*times, bucket=2048, largest=16384, calls=1):
    """One shape's, with 2, 4, ... warps."""
    pairs = zip(tune.WARPS, times, strict=False)
    return [{"largest": largest, "bucket": bucket, "warps": w, "calls": calls, "microseconds": t} for w, t in pairs]


def test_the_table_has_the_fastest_warps_of_each_size_of_tile():
    found = rows(3.0, 2.0, 4.0) + rows(9.0, 8.0, 5.0, bucket=16384)
    assert tune.fit(found) == ((2048, 4), (16384, 8))
    assert tune.fit(found + rows(1.0, 2.5, 4.0, calls=9)) == ((2048, 2), (16384, 8))


def test_the_largest_tile_is_the_one_of_the_least_time_together():
    small, large = rows(4.0, 3.0), rows(5.0, 2.0, bucket=32768, largest=32768)
    assert tune.fit(small + large) == ((32768, 4),)
    assert tune.fit(small + rows(5.0, 3.5, bucket=8192, largest=32768)) == ((2048, 4), (16384, 4))


def test_what_does_not_fit_the_chip_is_not_taken():
    assert tune.fit(rows(None, 9.0) + rows(1.0, 1.0)) == ((2048, 4), (16384, 4))
    whole = rows(7.0, 7.0)
    assert tune.fit(whole + rows(None, None, bucket=65536, largest=65536)) == ((2048, 2), (16384, 2))
    with pytest.raises(ValueError, match="no largest tile was measured at every shape"):
        tune.fit(rows(None, None))


@pytest.mark.slow
def test_it_runs_in_the_interpreter(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tried on the CPU")
    config = UNetConfig(
        sample_size=4,
        base_channels=32,
        channel_multipliers=(1,),
        layers_per_block=1,
        attention_resolutions=(),
        num_classes=None,
    )
    monkeypatch.setattr(tune, "network", lambda name: UNet(config).eval())
    monkeypatch.setattr(tune, "WARPS", (2,))
    monkeypatch.setattr(tune, "LARGEST", {"FORWARD": (4096,), "BACKWARD": (256, 4096)})  # of 256, in chunks
    monkeypatch.setattr("every_cpu.TURNS", 1)
    out = tmp_path / "tune.json"
    monkeypatch.setattr("sys.argv", ["tune.py", "--batch", "1", "--out", str(out)])
    tune.main()
    result = json.loads(out.read_text())
    assert result["tables"].keys() == {"FORWARD", "BACKWARD"} and result["tables"]["FORWARD"][-1][0] == 4096
    assert {row["table"] for row in result["rows"]} == {"FORWARD", "BACKWARD"}
    assert {row["skip"] for row in result["rows"]} == {0, 32} and {row["block_p"] for row in result["rows"]} > {16}
    shown = capsys.readouterr().out
    assert f"# now {group_norm_tiles.FORWARD!r}" in shown and "not measured" not in shown


def test_the_time_is_kept(monkeypatch):
    monkeypatch.setattr(tune, "shapes", lambda name: [tune.Shape(32, 0, (4, 4), 8, False, True, 1)])
    monkeypatch.setattr("sys.argv", ["tune.py", "--minutes", "-1"])
    monkeypatch.setattr(tune, "DEVICE", "cpu")
    with pytest.raises(SystemExit, match=r"--minutes -1\.0: the time was up before the first shape"):
        tune.main()
