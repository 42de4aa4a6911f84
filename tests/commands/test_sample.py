import json
import sys

import numpy as np
import pytest
from PIL import Image

from ddim_fast import sample
from ddim_fast.cli import run_command


@pytest.fixture
def checkpoint(small_unet, tmp_path):
    folder = tmp_path / "checkpoint"
    small_unet.save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; returns its exit code, stdout and stderr."""

    def run(*arguments):
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(sample.main)
        return (stop.value.code, *capsys.readouterr())

    return run


def test_writes_an_image_a_seed_and_a_grid(run, checkpoint, tmp_path):
    code, out, err = run("--model", checkpoint, "--steps", 2, "--seeds", "0-2,40", "--out", tmp_path / "o", "--batch-size", 3)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "000040.png",
        "grid.png",
    ]
    assert Image.open(tmp_path / "o" / "000040.png").size == (16, 16)
    assert Image.open(tmp_path / "o" / "grid.png").size == ((4 * 18 + 2) * 4, (18 + 2) * 4)
    assert "4 images of 2 steps" in out and "images/s" in out and "network evaluations/s" in out and "warm-up" in out
    assert "step/s" in err


@pytest.mark.parametrize(
    "options,fast,dtype",
    [
        ([], True, "float32"),
        (["--compile"], True, "bfloat16"),
        (["--compile"], False, "float32"),
        (["--compile", "--dtype", "float32"], True, "float32"),
        (["--dtype", "bfloat16"], False, "bfloat16"),
    ],
)
def test_the_dtype_is_the_best_for_the_device_or_what_was_asked_for(options, fast, dtype, run, checkpoint, monkeypatch):
    monkeypatch.setattr(sample, "bf16_is_fast", lambda device: fast)
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)
    code, out, _ = run("--model", checkpoint, "--steps", 1, "--seeds", "0,1", *options)
    assert code == 0 and f" s, {dtype}: " in out


def test_quiet_says_nothing(run, checkpoint):
    assert run("--model", checkpoint, "--steps", 1, "--seeds", "0", "--quiet") == (0, "", "")


def test_the_files_are_the_same_whatever_the_batch_size(run, checkpoint, tmp_path):
    for size in (1, 2, 5):
        run(
            "--model",
            checkpoint,
            "--steps",
            2,
            "--eta",
            1,
            "--seeds",
            "0-4",
            "--batch-size",
            size,
            "--out",
            tmp_path / str(size),
        )
    for seed in range(5):
        files = [(tmp_path / str(size) / f"{seed:06d}.png").read_bytes() for size in (1, 2, 5)]
        assert files[0] == files[1] == files[2]


def test_the_trajectory_is_a_film_that_ends_in_the_images(run, checkpoint, tmp_path):
    film = tmp_path / "f" / "film.gif"
    run(
        "--model",
        checkpoint,
        "--steps",
        3,
        "--seeds",
        "0-3",
        "--batch-size",
        2,
        "--trajectory",
        film,
        "--grid",
        tmp_path / "g.png",
    )
    gif = Image.open(film)
    assert gif.n_frames == 3
    gif.seek(2)
    last = np.asarray(gif.convert("RGB")).astype(int)
    both = np.asarray(Image.open(tmp_path / "g.png").convert("RGB")).astype(int)
    assert np.abs(last[8:72, 8:144] - both[8:72, 8:144]).mean() < 12  # a GIF has 256 colours


def test_classes_are_used_in_turn(run, checkpoint, tmp_path):
    run("--model", checkpoint, "--steps", 2, "--seeds", "7,8,9", "--class", "3,5", "--out", tmp_path / "a")
    run("--model", checkpoint, "--steps", 2, "--seeds", "8", "--class", "5", "--out", tmp_path / "b")
    run("--model", checkpoint, "--steps", 2, "--seeds", "8", "--out", tmp_path / "c")
    run("--model", checkpoint, "--steps", 2, "--seeds", "8", "--class", "8", "--out", tmp_path / "d")
    images = {f: (tmp_path / f / "000008.png").read_bytes() for f in "abcd"}
    assert images["a"] == images["b"] != images["c"] == images["d"]


def test_the_reference_spacing_says_how_many_steps_it_makes(run, checkpoint):
    _, out, _ = run("--model", checkpoint, "--steps", 300, "--spacing", "ermongroup-uniform", "--seeds", "0", "--class", "none")
    assert "makes 334 timesteps of 300 steps" in out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--steps", "0"], "steps must be a whole number from 1 to 1000"),
        (["--steps", "1001"], "got 1001"),
        (["--steps", "many"], "--steps"),
        (["--eta", "-0.5"], "eta must lie in [0, 1]"),
        (["--eta", "1.5"], "eta must lie in [0, 1]"),
        (["--eta", "nan"], "eta must lie in [0, 1]"),
        (["--eta", "much"], "sigma-hat"),
        (["--class", "10"], "class 10 is out of range: the network has classes 0..9"),
        (["--class", "boot"], "--class"),
        (["--class", "none", "--guidance", "2"], "needs class labels"),
        (["--spacing", "karras"], "unknown spacing 'karras'"),
        (["--spacing", "999,1000"], "timesteps must lie in 0..999"),
        (["--solver", "euler"], "--solver"),
        (["--solver", "unipc", "--eta", "1"], "option of the ddim solver"),
        (["--seeds", "5-1"], "runs backwards"),
        (["--seeds", "x"], "--seeds"),
        (["--seeds", "99999999999999999999"], "a seed is a whole number"),
        (["--batch-size", "0"], "--batch-size"),
        (["--clip", "0"], "clip_sample_range must be positive"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--device", "cuda:77"], "not available"),
        (["--dtype", "int8"], "--dtype"),
        (["--trajectory", "film.mp4"], "film.mp4"),
        (["--grid", "grid.xyz"], "grid.xyz"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, message, run, checkpoint, tmp_path):
    code, out, err = run("--model", checkpoint, *arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1 and out == ""
    assert list((tmp_path / "here").iterdir()) == []


def test_an_unknown_model_is_a_usage_error(run):
    code, _, err = run("--model", "nonesuch")
    assert code == 2 and "unknown model 'nonesuch'" in err and err.count("\n") == 1


def _truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "damage,message",
    [
        (_truncate, "model.safetensors: not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 64), "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: _change_config(f, base_chanels=3), "did you mean 'base_channels'"),
        (lambda f: _change_config(f, base_channels="16"), "base_channels must be an integer"),
        (lambda f: _change_config(f, base_channels=32), "has shape"),
        (lambda f: _change_config(f, layers_per_block=2), "missing tensor"),
        (lambda f: _change_config(f, num_classes=None), "unexpected tensor 'class_embedding.weight'"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_exit_code_1(damage, message, run, checkpoint, tmp_path):
    damage(checkpoint)
    code, out, err = run("--model", checkpoint)
    assert code == 1
    assert message in err and err.count("\n") == 1 and out == ""
    assert list((tmp_path / "here").iterdir()) == []


def test_an_output_folder_that_cannot_be_made_is_one_line_and_exit_code_1(run, checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("--model", checkpoint, "--out", tmp_path / "file" / "out")
    assert code == 1 and "Not a directory" in err and err.count("\n") == 1


def test_help_shows_examples_and_defaults(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "examples:" in out and "--class 9 --guidance 2" in out and "(default: 20)" in out
