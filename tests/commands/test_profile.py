"""python -m ddim_fast.sample --profile."""

import functools
import json

import pytest

from ddim_fast import sample


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, sample)


def test_writes_a_trace_and_prints_where_the_time_went(run, checkpoint, here):
    code, out, err = run("--model", checkpoint, "--profile", "--steps", 2, "--seeds", "0-4", "--batch-size", 3, "--guidance", 2)
    assert code == 0 and "profiling a batch of 3" in err
    assert [path.name for path in here.rglob("*")] == ["profile", "trace.json"]
    names = {event["name"] for event in json.loads((here / "profile" / "trace.json").read_text())["traceEvents"]}
    assert {"ddim_fast.run", "aten::conv2d", "ddim_fast::solver_step"} <= names
    assert out.startswith("a batch of 3 in 2 steps, eager, float32, cpu: ")
    for line in ("convolutions ", "attention ", "norms with SiLU ", "solver ", "gaps ", "sum ", "implementations: "):
        assert f"\n{line}" in out
    assert out.endswith("\nprofile/trace.json lists every operator; open it in ui.perfetto.dev\n")


def test_goes_into_the_folder_that_is_named_and_says_nothing_if_told_so(run, checkpoint, here):
    options = ["--model", checkpoint, "--profile", "--steps", 1, "--seeds", 0, "--quiet", "--out"]
    assert run(*options, here / "a" / "b") == (0, "", "")
    assert [path.name for path in here.rglob("*")] == ["a", "b", "trace.json"]
    code, _, err = run(*options, here / "a" / "b")
    assert code == 2 and "b is not empty (trace.json)" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--engine", "onnx"], "leave out --engine onnx"),
        (["--tolerance", "0.1"], "leave out --tolerance"),
        (["--grid", "grid.png"], "leave out --grid"),
        (["--trajectory", "film.gif"], "leave out --trajectory"),
        (["--out", "images.npz"], "leave out an .npz file as --out"),
        (["--steps", "0"], "steps must be a whole number"),
    ],
)
def test_what_cannot_be_profiled_is_one_line_and_exit_code_2(arguments, message, run, checkpoint, here):
    code, out, err = run("--model", checkpoint, "--profile", *arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1 and out == ""
    assert list(here.iterdir()) == []


def test_under_torchrun_there_is_no_profile(run, checkpoint, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    from ddim_fast.cli.parser import CommandParser
    from ddim_fast.cli.profiling import check_profile_options

    options = {"profile": True, "engine": "auto", "tolerance": None, "grid": None, "trajectory": None, "out": None}
    with pytest.raises(SystemExit, match="2"):
        check_profile_options(CommandParser("sample", "", ""), options)
