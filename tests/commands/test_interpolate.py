import functools
import json

import numpy as np
import pytest
from PIL import Image

from ddim_fast import Sampler, UNet, interpolate
from ddim_fast.io.pictures import to_uint8


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, interpolate, "--model", "fashion-mnist")


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_between_seeds_the_ends_are_their_samples(run, here):
    code, out, _ = run("seed:3", "seed:13", "--class", 3, "--steps", 4, "--frames", 5, "--out", "o")
    assert code == 0 and out == "5 images, seed:3 to seed:13; see o, o/grid.png, o/film.gif\n"
    samples = to_uint8(Sampler(UNet.from_pretrained("fashion-mnist"), steps=4).sample(seeds=[3, 13], labels=3))
    assert np.array_equal(picture(here / "o" / "0.png"), samples[0, ..., 0])
    assert np.array_equal(picture(here / "o" / "4.png"), samples[1, ..., 0])
    assert len({(here / "o" / f"{i}.png").read_bytes() for i in range(5)}) == 5
    assert Image.open(here / "o" / "grid.png").size == (2 * (2 + 5 * 34), 2 * (2 + 34))
    assert Image.open(here / "o" / "film.gif").n_frames == 9
    record = json.loads((here / "o" / "record.json").read_text())
    assert record["command"] == "interpolate" and record["finished"] is True
    assert record["settings"].items() >= {"ENDS": ["seed:3", "seed:13"], "class": 3}.items()


def test_between_images_the_ends_are_the_images(run, here):
    for i, image in enumerate(to_uint8(Sampler(UNet.from_pretrained("fashion-mnist"), steps=8).sample(seeds=[1, 2]))):
        Image.fromarray(image[..., 0]).save(here / f"{i}.png")
    assert run("0.png", "1.png", "--exact", "--steps", 6, "--frames", 3, "--out", "o", "--quiet") == (0, "", "")
    for end, frame in ((0, 0), (1, 2)):
        assert np.abs(picture(here / f"{end}.png") - picture(here / "o" / f"{frame}.png")).max() <= 1


def test_no_class_is_said_as_everywhere(run, here):
    for out, options in (("a", []), ("b", ["--class", "none"])):
        assert run("seed:1", "seed:2", "--steps", 1, "--frames", 2, "--out", out, "--quiet", *options) == (0, "", "")
    assert (here / "a/0.png").read_bytes() == (here / "b/0.png").read_bytes()


def test_ends_of_another_size_are_resized_with_a_line_that_says_so(run, here):
    Image.linear_gradient("L").resize((40, 64)).save(here / "a.png")
    options = ["--steps", 1, "--frames", 2]
    _, _, err = run("a.png", "seed:1", *options, "--out", "crop")
    assert "a.png, 40x64, was brought to 32x32: cropped to a square in the middle and resized (--resize" in err
    _, _, err = run("a.png", "seed:1", *options, "--out", "pad", "--resize", "pad")
    assert "a.png, 40x64, was brought to 32x32: resized into a black frame" in err
    assert (here / "crop/0.png").read_bytes() != (here / "pad/0.png").read_bytes()
    assert run("a.png", "seed:1", *options, "--quiet") == (0, "", "")


def test_four_corners_make_a_square(run, here):
    assert run("seed:1", "seed:2", "seed:3", "seed:4", "--steps", 1, "--frames", 4, "--out", "o", "--quiet") == (0, "", "")
    assert sorted(p.name for p in (here / "o").iterdir())[:16] == [f"{i:02d}.png" for i in range(16)]
    assert not (here / "o" / "film.gif").exists()
    assert Image.open(here / "o" / "grid.png").size == (2 * (2 + 4 * 34), 2 * (2 + 4 * 34))
