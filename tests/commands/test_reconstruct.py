import functools
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddim_fast import Sampler, UNet, reconstruct
from ddim_fast.io.pictures import to_uint8


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, reconstruct, "--model", "fashion-mnist")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two samples of the packaged fashion-mnist in folders of their classes, numbered as the model's."""
    place = tmp_path_factory.mktemp("pictures")
    for label in range(10):
        (place / f"{label}").mkdir()
    images = Sampler(UNet.from_pretrained("fashion-mnist"), steps=10).sample(seeds=[0, 1], labels=[3, 9], guidance=2.0)
    for label, image in zip((3, 9), images, strict=True):
        Image.fromarray(((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).save(place / f"{label}" / "a.png")
    return place


def errors_of(folder):
    record = json.loads((folder / "record.json").read_text())
    assert record["command"] == "reconstruct" and record["finished"] is True
    assert isinstance(record["settings"]["steps"], int) and isinstance(record["settings"]["exact"], bool)
    assert list(record["errors"]) == ["a", "a-2"]
    return np.array([*record["errors"].values()])


def test_the_error_falls_with_the_steps_and_vanishes_with_exact(run, pictures, here):
    for steps, out in ((5, "five"), (20, "twenty")):
        code, text, _ = run(pictures, "--steps", steps, "--out", out)
        assert code == 0 and f"2 images encoded and decoded in {steps} steps: mean squared error" in text
    code, text, _ = run(pictures, "--steps", 5, "--exact", "--out", "exact")
    assert code == 0 and "in 5 steps, exactly: " in text
    five, twenty, exact = (errors_of(here / out) for out in ("five", "twenty", "exact"))
    assert (twenty < five).all() and (exact < 1e-6).all()


def test_the_latents_are_those_of_the_sampler(run, pictures, here):
    assert run(pictures, "--steps", 4, "--guidance", 1.5, "--batch-size", 1, "--quiet") == (0, "", "")
    saved = load_file(here / "reconstruction" / "latents.safetensors")
    assert saved["labels"].tolist() == [3, 9] and saved["x_T"].shape == (2, 1, 32, 32)
    sampler = Sampler(UNet.from_pretrained("fashion-mnist"), steps=4)
    again = sampler.sample(x_T=saved["x_T"], labels=saved["labels"], guidance=1.5)
    images = [np.asarray(Image.open(pictures / name / "a.png")) for name in ("3", "9")]
    difference = (again[:, 0] / 2 + 0.5) - torch.tensor(np.stack(images)) / 255
    np.testing.assert_allclose(difference.square().mean((1, 2)), errors_of(here / "reconstruction"), rtol=1e-3)
    assert {path.name for path in (here / "reconstruction").glob("*.png")} == {"a.png", "a-2.png", "comparison.png"}
    assert np.array_equal(np.asarray(Image.open(here / "reconstruction" / "a-2.png")), to_uint8(again)[1, ..., 0])
    # Original, noise and reconstruction of both, in three rows.
    assert Image.open(here / "reconstruction" / "comparison.png").size == (2 * (2 + 2 * 34), 2 * (2 + 3 * 34))


def test_pictures_of_another_size_are_resized_with_a_line_that_says_so(run, here):
    for name, size in (("a", (40, 64)), ("b", (64, 40)), ("c", (28, 28))):
        Image.linear_gradient("L").resize(size).save(here / f"{name}.png")
    code, _, err = run("a.png", "b.png", "c.png", "--steps", 1, "--class", 1)
    ways = "2 cropped to a square in the middle and resized, 1 put into a black frame"
    assert code == 0 and f"3 images were brought to 32x32: {ways} (--resize names another way)" in err
    code, _, err = run("c.png", "--steps", 1, "--class", 1, "--resize", "stretch", "--out", "o")
    assert code == 0 and "c.png, 28x28, was brought to 32x32: resized (--resize names another way)" in err
    assert json.loads((here / "o" / "record.json").read_text())["settings"]["resize"] == "stretch"


def test_files_and_a_class_by_hand(run, pictures, here):
    files = [pictures / "3" / "a.png", pictures / "9" / "a.png"]
    assert run(*files, "--steps", 2, "--quiet") == (0, "", "")
    assert "labels" not in load_file(here / "reconstruction" / "latents.safetensors")
    assert run(files[0], "--steps", 2, "--class", 5, "--out", "five", "--quiet") == (0, "", "")
    assert load_file(here / "five" / "latents.safetensors")["labels"].tolist() == [5]


def test_a_warning_of_this_package_is_a_line(run_here, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    run_here(reconstruct, "--help")
    assert warnings.formatwarning("skipped", UserWarning, reconstruct.__file__, 1) == "warning: skipped\n"
    assert "UserWarning" in warnings.formatwarning("skipped", UserWarning, "elsewhere.py", 1)
