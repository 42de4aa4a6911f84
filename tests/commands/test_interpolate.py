import json
import sys

import numpy as np
import pytest
from PIL import Image

from ddim_fast import Sampler, UNet, interpolate
from ddim_fast.cli import run_command
from ddim_fast.media import to_uint8


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command in a folder of its own; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["interpolate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(interpolate.main)
        return (stop.value.code, *capsys.readouterr())

    return run


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_between_seeds_the_ends_are_their_samples(run, tmp_path):
    code, out, _ = run("seed:3", "seed:13", "--class", 3, "--steps", 4, "--frames", 5, "--out", "o")
    assert code == 0 and out == "5 images, seed:3 to seed:13; see o\n"
    samples = to_uint8(Sampler(UNet.from_pretrained("fashion-mnist"), steps=4).sample(seeds=[3, 13], labels=3))
    assert np.array_equal(picture(tmp_path / "o" / "0.png"), samples[0, ..., 0])
    assert np.array_equal(picture(tmp_path / "o" / "4.png"), samples[1, ..., 0])
    assert len({(tmp_path / "o" / f"{i}.png").read_bytes() for i in range(5)}) == 5
    assert Image.open(tmp_path / "o" / "grid.png").size == (2 * (2 + 5 * 34), 2 * (2 + 34))
    assert Image.open(tmp_path / "o" / "film.gif").n_frames == 9
    record = json.loads((tmp_path / "o" / "interpolation.json").read_text())
    assert record["ends"] == ["seed:3", "seed:13"] and record["label"] == 3


def test_between_images_the_ends_are_the_images(run, tmp_path):
    for i, image in enumerate(to_uint8(Sampler(UNet.from_pretrained("fashion-mnist"), steps=8).sample(seeds=[1, 2]))):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    assert run("0.png", "1.png", "--exact", "--steps", 6, "--frames", 3, "--out", "o", "--quiet") == (0, "", "")
    for end, frame in ((0, 0), (1, 2)):
        assert np.abs(picture(tmp_path / f"{end}.png") - picture(tmp_path / "o" / f"{frame}.png")).max() <= 1


def test_four_corners_make_a_square(run, tmp_path):
    assert run("seed:1", "seed:2", "seed:3", "seed:4", "--steps", 1, "--frames", 4, "--out", "o", "--quiet") == (0, "", "")
    assert sorted(p.name for p in (tmp_path / "o").iterdir())[:16] == [f"{i:02d}.png" for i in range(16)]
    assert not (tmp_path / "o" / "film.gif").exists()
    assert Image.open(tmp_path / "o" / "grid.png").size == (2 * (2 + 4 * 34), 2 * (2 + 4 * 34))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["seed:1"], "give two ends, or four corners; got 1"),
        (["seed:1", "seed:x"], "'seed:x' is no seed: write it as seed:7"),
        (["seed:1", "nowhere.png"], "no images at 'nowhere.png'"),
        (["seed:1", "seed:2", "--frames", "1"], "--frames must be at least 2"),
        (["seed:1", "seed:2", "--class", "10"], "class 10 is out of range"),
        (["seed:1", "seed:2", "--out", "full"], "full exists and is not an empty folder"),
        (["seed:1", "text.png"], "text.png: not a readable image"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(arguments, message, run, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    code, out, err = run(*arguments, "--steps", "1")
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "text.png"]
