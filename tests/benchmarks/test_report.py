import json
import subprocess
import sys
from pathlib import Path

import pytest
import report
from report import table

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "report.py"


def benchmark(group, name, seconds, **shares):
    return {
        "group": group,
        "name": f"test_norm[{name}]",
        "params": {"implementation": name},
        "extra_info": {"microseconds": seconds * 1e6, **shares},
        "stats": {"median": seconds},
    }


RUN = {
    "benchmarks": [
        benchmark("small", "ours", 1e-6, **{"share of copy": 0.5}),
        benchmark("small", "theirs", 3e-6, **{"share of copy": 0.25}),
        benchmark("large", "theirs", 2e-3, **{"share of copy": 0.1, "share of matmul": 0.8}),
    ]
}


def test_ratios_stand_beside_the_baselines_times():
    assert table(RUN, "theirs").splitlines() == [
        "| | theirs | ours |",
        "|---|---|---|",
        "| small | 3.0 us, 25% of copy | 3.00x, 50% of copy |",
        "| large | 2000.0 us, 80% of matmul | - |",
    ]


def test_implementations_timed_in_turns_are_columns_of_one_row():
    unet = {"evaluations/s": {"ours bf16": 30.0, "theirs fp32": 12.0}, "share of matmul": {"ours bf16": 0.75}}
    sampler = {"evaluations/s": {"ours bf16": 80.0, "theirs fp32": 20.0}, "images/s": {"ours bf16": 8.0, "theirs fp32": 2.0}}
    rough = {"images/s": {"ours bf16": 6.0, "theirs fp32": 2.0}, "error": {"ours bf16": 0.0123, "theirs fp32": 0.01}}
    groups = {"unet": unet, "sampler": sampler, "rough": rough}
    run = {"benchmarks": [{"group": group, "extra_info": info} for group, info in groups.items()]}
    assert table(run, "theirs fp32").splitlines() == [
        "| | theirs fp32 | ours bf16 |",
        "|---|---|---|",
        "| unet | 12.0 evaluations/s | 2.50x, 75% of matmul |",
        "| sampler | 2.0 images/s | 4.00x |",
        "| rough | 2.0 images/s, error 0.010 | 3.00x, error 0.012 |",
    ]


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match="the baseline must be one of ours, theirs; got 'nobody'"):
        table(RUN, "nobody")


def test_the_command(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    command = [sys.executable, SCRIPT, path, "--baseline", "theirs"]
    assert "3.00x" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    path.write_text("{")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.fixture
def evaluation():
    def row(steps, fid, **settings):
        settings = {"solver": "ddim", "spacing": "linear", "eta": 0.0, "guidance": None, "steps": steps, **settings}
        return {"kind": "quality", "label": "FID-512", "FID-512": fid, "settings": settings}

    return {"rows": [row(10, 40.04), row(5, 50), row(5, 60, eta=1.0), row(5, 30, guidance=2.0), row(20, 9, solver="unipc")]}


def test_fid_by_steps_is_of_plain_deterministic_runs(evaluation):
    assert report.fid_by_steps(evaluation) == {"ddim, linear": {5: 50, 10: 40.04}, "unipc, linear": {20: 9}}
    assert report.fid_table(evaluation, [5, 10]).splitlines()[2:] == ["| ddim, linear | 50.0 | 40.0 |"]


def test_the_plot_of_fid(evaluation, tmp_path):
    report.plot_fid(evaluation, tmp_path / "fid.png")
    assert (tmp_path / "fid.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_an_image_are_of_our_fastest_engine_in_the_networks_dtype():
    def of(group, **rates):
        return {"group": group, "extra_info": {"evaluations/s": {name.replace("_", " "): rate for name, rate in rates.items()}}}

    run = {
        "benchmarks": [
            of("small batch 1 steps 10", captured_bf16=50.0, openvino_bf16=400.0, captured_int8=500.0),
            of("small batch 8 steps 10", captured_bf16=80.0, eager_bf16=100.0, eager_fp32=40.0),
            of("small-2 batch 8 steps 10", eager_bf16=1000.0),
        ]
    }
    assert report.fastest(run, "small", "bfloat16") == (0.01, "eager bf16, small batch 8 steps 10")
    assert report.fastest(run, "small", "float32") == (1 / 40, "eager fp32, small batch 8 steps 10")
    with pytest.raises(ValueError, match="--speed has no run of small in float16"):
        report.fastest(run, "small", "float16")


@pytest.mark.parametrize("model", ["cifar10-64", "fashion-mnist"])
def test_the_plot_of_fid_against_seconds(model, tmp_path, monkeypatch):
    """Of the committed files, by the command."""
    from matplotlib import axes

    drawn = {}
    plot = axes.Axes.plot

    def watched(self, x, y, **options):
        drawn[options["label"]] = x, y
        return plot(self, x, y, **options)

    monkeypatch.setattr(axes.Axes, "plot", watched)
    results = SCRIPT.parent / "results" / "zen4-two-cores"
    evaluation, speed = results / model / "evaluation.json", results / "sampler-avx512.json"
    path = tmp_path / "fid-time.png"
    monkeypatch.setattr(sys, "argv", ["report.py", str(evaluation), "--speed", str(speed), "--plot", str(path)])
    report.main()
    assert path.read_bytes().startswith(b"\x89PNG")
    fid = report.fid_by_steps(json.loads(evaluation.read_text()))
    rates = [b["extra_info"]["evaluations/s"] for b in json.loads(speed.read_text())["benchmarks"] if f"{model} " in b["group"]]
    rate = max(rate["captured bf16"] for rate in rates)
    assert drawn.keys() == fid.keys()
    for name, (milliseconds, values) in drawn.items():
        assert milliseconds == pytest.approx([1e3 * steps / rate for steps in fid[name]]) and values == list(fid[name].values())


def test_the_time_of_an_image_is_not_of_several_dtypes(evaluation, tmp_path):
    for row, dtype in zip(evaluation["rows"], ["float32", *["bfloat16"] * 4], strict=True):
        row["settings"] |= {"model": "small", "dtype": dtype}
    with pytest.raises(ValueError, match="of one model and dtype; the evaluation has"):
        report.plot_fid(evaluation, tmp_path / "fid.png", {"benchmarks": []})


def test_speeds_are_read_from_the_groups(tmp_path):
    def of(group, **rates):
        return {"group": group, "extra_info": {"images/s": rates}}

    run = {
        "benchmarks": [
            of("1x32x32 batch 8 steps 10", ours=4.0),
            of("1x32x32 batch 64 steps 20", ours=2.0),
            of("other", ours=1.0),
        ]
    }
    assert report.speeds(run) == [("ours", 8, 10, 4.0), ("ours", 64, 20, 2.0)]
    report.plot_speeds(run, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
