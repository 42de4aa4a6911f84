import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ddim_fast import Sampler, UNet, edit
from ddim_fast.data.images import load_images, to_unit_range
from ddim_fast.diffusion.editing import attribute_direction, move_along, sdedit, swap_class
from ddim_fast.io.pictures import to_uint8


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, edit, "--model", "fashion-mnist")


@pytest.fixture(scope="module")
def sampler():
    return Sampler(UNet.from_pretrained("fashion-mnist"), steps=3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, sampler):
    """Three samples of the packaged fashion-mnist, dark ones and bright ones of which, and an empty folder."""
    place = tmp_path_factory.mktemp("pictures")
    images = to_uint8(sampler.sample(seeds=[0, 1, 2], labels=[7, 7, 9], guidance=2.0))
    for folder, change in (("shoes", 1.0), ("dark", 0.5), ("empty", None)):
        (place / folder).mkdir()
        for i, image in enumerate(images if change else ()):
            Image.fromarray((change * image[..., 0]).astype(np.uint8)).save(place / folder / f"{i}.png")
    return place


def loaded(folder):
    return to_unit_range(load_images(str(folder), 1, 32).images).contiguous()


def written(folder, count=3):
    return np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(count)])


def test_sdedit(run, pictures, here, sampler):
    shoes = pictures / "shoes"
    code, out, _ = run(shoes, "--strength", 0.5, "--class", 9, "--guidance", 2, "--steps", 3, "--seed", 5, "--batch-size", 2)
    assert code == 0 and out == "3 images edited; see edited\n"
    expected = sdedit(sampler, loaded(shoes), 0.5, seeds=[5, 6, 7], labels=9, guidance=2.0)
    assert np.array_equal(written(here / "edited"), to_uint8(expected)[..., 0])
    assert Image.open(here / "edited" / "comparison.png").size == (2 * (2 + 3 * 34), 2 * (2 + 2 * 34))
    record = json.loads((here / "edited" / "record.json").read_text())
    assert record["command"] == "edit" and record["finished"] is True
    expected_settings = {"strength": 0.5, "dtype": "float32", "label": "9", "images": [str(shoes)], "batch-size": 2}
    assert record["settings"].items() >= expected_settings.items()
    assert run(shoes, "--strength", 0, "--steps", 3, "--out", "same", "--quiet") == (0, "", "")
    assert np.array_equal(written(here / "same"), written(shoes))


def test_pictures_of_another_size_are_resized_with_a_line_that_says_so(run, here, sampler):
    (here / "photos").mkdir()
    for name in "01":
        Image.linear_gradient("L").resize((64, 40)).save(here / "photos" / f"{name}.png")
    code, _, err = run("photos", "--strength", 0, "--steps", 3)
    assert code == 0 and "2 images were brought to 32x32: cropped to a square in the middle and resized (--resize" in err
    assert np.array_equal(written(here / "edited", 2), to_uint8(loaded(here / "photos"))[..., 0])
    code, _, err = run("photos", "--direction", "photos", "photos", "--steps", 1, "--resize", "pad", "--out", "o")
    assert code == 0 and "6 images were brought to 32x32: resized into a black frame" in err


def test_another_class(run, pictures, here, sampler):
    shoes = pictures / "shoes"
    assert run(shoes, "--from", 7, "--to", 9, "--guidance", 2, "--steps", 3, "--batch-size", 2, "--quiet") == (0, "", "")
    expected = swap_class(sampler, loaded(shoes), source=7, target=9, guidance=2.0)
    assert np.array_equal(written(here / "edited"), to_uint8(expected)[..., 0])
    options = ("--to", "ankle boot", "--guidance", 2, "--steps", 3, "--quiet")
    assert run(shoes, "--from", "Sneaker", *options, "--out", "named") == (0, "", "")
    assert np.array_equal(written(here / "named"), written(here / "edited"))
    shutil.copytree(shoes, here / "data" / "sneaker")
    assert run("data", *options, "--out", "own") == (0, "", "")  # the folder says what its images are
    assert np.array_equal(written(here / "own"), written(here / "edited"))


def test_exact_inversion_brings_the_image_back(run, pictures, here):
    image = pictures / "shoes" / "0.png"
    assert run(image, "--from", 7, "--to", 7, "--exact", "--steps", 6, "--strength", 0.3, "--quiet") == (0, "", "")
    assert np.abs(written(here / "edited", 1)[0].astype(int) - np.asarray(Image.open(image))).max() <= 1


def test_an_attribute(run, pictures, here, sampler):
    shoes, dark = pictures / "shoes", pictures / "dark"
    options = ["--direction", dark, shoes, "--steps", 3, "--strength", 0.4, "--quiet"]
    for amount, out in ((1, "darker"), (-0.5, "brighter")):
        assert run(shoes, *options, "--amount", amount, "--out", out) == (0, "", "")
    direction = attribute_direction(sampler, loaded(dark), loaded(shoes), strength=0.4)
    expected = move_along(sampler, loaded(shoes), direction, -0.5, strength=0.4)
    assert np.array_equal(written(here / "brighter"), to_uint8(expected)[..., 0])
    assert written(here / "darker").mean() < written(shoes).mean() < written(here / "brighter").mean()


def test_an_interrupted_edit_leaves_nothing(run, pictures, here, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddim_fast.cli.comparison.write_json", interrupted)
    assert run(pictures / "shoes", "--strength", 0.5, "--steps", 1, "--quiet") == (130, "", "")
    assert list(here.iterdir()) == []
