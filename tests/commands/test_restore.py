import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import Sampler, UNet, restore
from ddim_fast.data.images import load_images, to_unit_range
from ddim_fast.data.resizing import fit_image
from ddim_fast.diffusion.degradations import Blur, Downscale
from ddim_fast.diffusion.restoration import TimeTravel
from ddim_fast.io.pictures import to_uint8

pytest.importorskip("skimage")


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, restore)


def save(folder, size, colours=3, names=("a", "b", "c")):
    """Random pictures, one a name."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, colours), dtype=np.uint8)
        Image.fromarray(pixels.squeeze()).save(folder / f"{name}.png")
    return folder


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def record(folder):
    return json.loads((folder / "record.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_known_pixels_of_the_files_are_those_of_the_input(run, checkpoint, here):
    photos = save(here / "photos", 16)
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:12] = 255
    Image.fromarray(mask).save(here / "mask.png")
    options = ["--model", checkpoint, "--steps", 2, "--batch-size", 2, "--quiet"]
    assert run("--task", "inpaint", photos, "--mask", "mask.png", *options) == (0, "", "")
    for name in "abc":
        before, after = picture(photos / f"{name}.png"), picture(here / "restored" / f"{name}.png")
        assert np.array_equal(before[mask == 0], after[mask == 0])
        assert (before[mask == 255] != after[mask == 255]).mean() > 0.5
    assert record(here / "restored")["overall"] == {"inconsistency": 0.0, "inconsistency_of_file": 0.0}
    # The measurement, with its hole, and the restored images.
    assert Image.open(here / "restored" / "comparison.png").size == (4 * (2 + 3 * 18), 4 * (2 + 2 * 18))
    assert run("--task", "inpaint", photos, "--rectangle", "5,3,7,6", *options, "--out", "same")[0] == 0
    assert contents(here / "same") == contents(here / "restored")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_in_a_mask_is_kept(mode, run, checkpoint, here):
    photos = save(here / "photos", 16, names="a")
    marked = np.zeros((16, 16), np.uint8)
    marked[3:9, 5:12] = 255
    if mode in ("RGBA", "LA"):  # white everywhere
        mask = Image.new(mode, (16, 16), "white")
        mask.putalpha(Image.fromarray(marked))
    else:  # two shades of white, one of them transparent
        mask = Image.fromarray(np.where(marked, 255, 254).astype(np.uint8)).convert(mode)
    mask.save(here / "mask.png", **({} if mode in ("RGBA", "LA") else {"transparency": 254}))
    options = ["--task", "inpaint", photos, "--model", checkpoint, "--steps", 2, "--quiet"]
    assert run(*options, "--mask", "mask.png") == (0, "", "")
    assert run(*options, "--rectangle", "5,3,7,6", "--out", "same")[0] == 0
    assert contents(here / "same") == contents(here / "restored")


def test_what_is_transparent_in_a_photograph_is_white(run, checkpoint, here):
    for name, alpha in (("clear", 0), ("white", 255)):
        (here / name).mkdir()
        Image.new("RGBA", (16, 16), (255 if alpha else 10,) * 3 + (alpha,)).save(here / name / "a.png")
        command = ("--task", "super-resolution", here / name, "--factor", 2, "--model", checkpoint, "--steps", 2, "--quiet")
        Image.open(here / name / "a.png").resize((8, 8)).save(here / name / "a.png")
        assert run(*command, "--out", f"of {name}") == (0, "", "")
    assert contents(here / "of clear") == contents(here / "of white")


@pytest.fixture
def photos(here):
    """Two photographs of 40x30, and one of the model's size."""
    (here / "photos").mkdir()
    for name, size in (("a", (40, 30)), ("b", (40, 30)), ("c", (16, 16))):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", [gradient, gradient.rotate(90), gradient.rotate(180)]).save(here / "photos" / f"{name}.png")
    return here / "photos"


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_photographs_of_any_size_are_restored_at_the_models_with_a_line_that_says_so(how, run, checkpoint, here, photos):
    options = ["--model", checkpoint, "--steps", 1, "--travel", 1, 1, "--resize", how]
    ways = {"crop": "cropped to a square in the middle and resized", "pad": "resized into a black frame"}
    done = ways.get(how, "stretched")
    code, _, err = run("--task", "inpaint", photos, "--rectangle", "0,0,4,4", *options)
    assert code == 0 and f"2 images were brought to 16x16: {done} (--resize names another way)\n" in err
    for name in "abc":
        expected = np.moveaxis(fit_image(Image.open(photos / f"{name}.png"), 3, 16, how), 0, -1)
        assert np.array_equal(picture(here / "restored" / f"{name}.png")[4:], expected[4:])
    code, _, err = run("--task", "super-resolution", photos / "a.png", *options, "--out", "large")
    assert code == 0 and f"a.png, 40x30, was brought to 8x8: {done} (--resize" in err
    expected = np.moveaxis(fit_image(Image.open(photos / "a.png"), 3, 8, how), 0, -1)
    assert np.array_equal(picture(here / "large" / "a.png").reshape(8, 2, 8, 2, 3).mean((1, 3)), expected)
    assert run("--task", "colorize", photos, *options, "--quiet", "--out", "quiet") == (0, "", "")
    _, _, err = run("--task", "colorize", photos / "c.png", *options, "--out", "own")
    assert "brought" not in err


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_a_mask_is_resized_as_its_photographs_are(how, run, checkpoint, here):
    """A blue photograph that is red where the mask is white: nothing of that may be left in what is kept."""
    marked = np.zeros((300, 400), bool)
    marked[110:175, 170:241] = True
    Image.fromarray(marked).save(here / "mask.png")
    blue = np.full((300, 400, 3), (0, 0, 200), np.uint8)
    spoilt = np.where(marked[..., None], np.uint8([255, 0, 0]), blue)
    Image.fromarray(spoilt).save(here / "photo.png")
    options = ["--mask", "mask.png", "--model", checkpoint, "--steps", 1, "--resize", how, "--quiet"]
    assert run("--task", "inpaint", "photo.png", *options) == (0, "", "")
    expected = fit_image(Image.fromarray(blue), 3, 16, how).transpose(1, 2, 0)
    hole = fit_image(Image.fromarray(marked), 1, 16, how, Image.Resampling.BOX)[0] > 0
    assert 9 <= hole.sum() < 36
    other = np.abs(picture(here / "restored" / "photo.png") - expected).max(-1)
    assert other[~hole].max() < 30 < other[hole].max()  # known pixels have the filter's ringing alone


def test_a_mask_of_the_models_size_is_of_the_photographs_as_they_are_resized(run, checkpoint, here, photos):
    mask = np.zeros((16, 16), np.uint8)
    mask[:4, :4] = 255
    Image.fromarray(mask).save(here / "mask.png")
    options = ["--task", "inpaint", photos, "--model", checkpoint, "--steps", 1, "--quiet"]
    assert run(*options, "--mask", "mask.png") == (0, "", "")
    assert run(*options, "--rectangle", "0,0,4,4", "--out", "same") == (0, "", "")
    assert contents(here / "same") == contents(here / "restored")


def test_time_travel_is_the_default_and_its_cost_is_said(run, checkpoint, here):
    photos = save(here / "photos", 16, names="a")
    options = ["--task", "colorize", photos, "--model", checkpoint, "--steps", 2]
    code, out, err = run(*options)
    assert code == 0 and "1 image restored by 6 network evaluations each" in out
    assert "1 image by 6 network evaluations each (--travel 1 3; --travel 1 1 takes 2)" in err
    code, out, err = run(*options, "--travel", 1, 1, "--out", "without")
    assert code == 0 and "by 2 network evaluations each" in out and "--travel" not in err
    assert "by 6 network evaluations each" in run(*options, "--noise-std", 0.1, "--out", "noisy")[1]
    deblur = ["--task", "deblur", "--sigma", 1, photos, "--model", checkpoint, "--steps", 2]
    assert "by 6 network evaluations each" in run(*deblur, "--out", "blurred")[1]
    assert "by 2 network evaluations each" in run(*deblur, "--noise-std", 0.1, "--out", "noisy and blurred")[1]
    assert run(*options, "--travel", 1, 3, "--out", "named")[0] == 0
    assert contents(here / "named") == contents(here / "restored")


def test_a_job_is_compiled_once(run, checkpoint, here, monkeypatch):
    """A last, smaller batch would have been compiled as well. (What compiling gives is a matter of the library's tests.)"""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    options = ["--task", "inpaint", "--rectangle", "2,1,4,4", save(here / "photos", 16), "--model", checkpoint, "--steps", 2]
    for engine in ("eager", "compiled"):
        assert run(*options, "--batch-size", 2, "--engine", engine, "--out", engine)[0] == 0
    assert len(compiled) == 1
    for name in "abc":
        assert np.abs(picture(here / "eager" / f"{name}.png") - picture(here / "compiled" / f"{name}.png")).max() <= 1


def test_files_are_restored_as_the_library_does_and_their_means_are_the_small_ones(run, checkpoint, here):
    small = save(here / "small", 8)
    assert run("--task", "super-resolution", small, "--model", checkpoint, "--steps", 3, "--class", 4, "--guidance", 2)[0] == 0
    measurement = to_unit_range(load_images(str(small), 3, 8).images).contiguous()
    sampler = Sampler(UNet.from_pretrained(checkpoint), steps=3)
    expected = sampler.restore(
        measurement, Downscale(2), seeds=[0] * 3, labels=4, guidance=2.0, eta=1.0, travel=TimeTravel(1, 3)
    )
    for name, image in zip("abc", to_uint8(Downscale(2).rounded(expected)), strict=True):
        restored = picture(here / "restored" / f"{name}.png")
        assert np.array_equal(restored, image)
        assert np.array_equal(restored.reshape(8, 2, 8, 2, 3).mean((1, 3)), picture(small / f"{name}.png"))
    assert max(record(here / "restored")["overall"].values()) < 1e-5


def test_of_many_each_is_what_it_is_alone(run, checkpoint, here):
    blurred = save(here / "blurred", 16)
    options = ["--task", "deblur", "--sigma", 1, "--model", checkpoint, "--steps", 2, "--seeds", "3,5", "--travel", 1, 2]
    assert run(blurred, *options, "--batch-size", 5)[0] == 0
    assert run(blurred / "b.png", *options, "--batch-size", 1, "--out", "alone")[0] == 0
    together, alone = contents(here / "restored"), contents(here / "alone")
    assert {name for name in together if name.startswith("b")} == {"b-3.png", "b-5.png"} == {n for n in alone if n[0] == "b"}
    for name in ("b-3.png", "b-5.png"):
        assert np.abs(picture(here / "restored" / name) - picture(here / "alone" / name)).max() <= 1
    assert together["b-3.png"] != together["b-5.png"] != together["a-5.png"]
    assert record(here / "alone")["settings"]["noise-std"] == pytest.approx(2 / 255 / 12**0.5)  # files are rounded


def test_colours_are_found_for_grey_images(run, checkpoint, here):
    grey = save(here / "grey", 16, colours=1)
    options = ["--task", "colorize", "--model", checkpoint, "--steps", 3]
    assert run(grey, *options)[0] == 0
    assert run(save(here / "colour", 16), *options, "--degrade", "--out", "degraded")[0] == 0
    found = picture(here / "restored" / "a.png")
    assert found.shape == (16, 16, 3) and (found != found[..., :1]).any()
    figures = record(here / "degraded")["overall"]
    assert figures["inconsistency"] < 1e-5 > record(here / "restored")["overall"]["inconsistency"]
    truth, seen = picture(here / "colour" / "a.png"), picture(here / "colour" / "a.png").mean(-1, keepdims=True)
    expected = 10 * np.log10(255**2 / np.square(truth - seen).mean())
    assert record(here / "degraded")["images"]["a"]["psnr_of_pseudo_inverse"] == pytest.approx(expected, abs=0.05)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Four samples of the packaged fashion-mnist in folders of their classes, numbered as the model's."""
    folder = tmp_path_factory.mktemp("clothes")
    labels = [0, 2, 5, 9]
    images = Sampler(UNet.from_pretrained("fashion-mnist"), steps=20).sample(seeds=range(4), labels=labels, guidance=2.0)
    for label in range(10):
        (folder / f"{label}").mkdir()
    for label, image in zip(labels, to_uint8(images), strict=True):
        Image.fromarray(image[..., 0]).save(folder / f"{label}" / f"{label}.png")
    return folder


@pytest.mark.parametrize(
    "task,evaluations,seen",
    [
        (["inpaint", "--rectangle", "10,10,12,12", "--travel", "1", "2"], 20, 3),
        (["super-resolution", "--factor", "4"], 30, 2),
        (["deblur", "--sigma", "1.5"], 30, 2),
        (["compressed-sensing", "--ratio", "0.3", "--travel", "1", "1"], 10, 5),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_figures_say_what_the_model_adds(task, evaluations, seen, run, clothes, here):
    code, out, _ = run("--task", *task, clothes, "--degrade", "--steps", 10, "--model", "fashion-mnist")
    assert code == 0 and f"4 images restored by {evaluations} network evaluations each" in out
    figures = record(here / "restored")["overall"]
    assert figures["psnr"] > figures["psnr_of_pseudo_inverse"] + seen
    assert figures["ssim"] > figures["ssim_of_pseudo_inverse"] + 0.05 and figures["inconsistency"] < 1e-3
    truth, after = picture(clothes / "9" / "9.png"), picture(here / "restored" / "9.png")
    psnr = 10 * np.log10(255**2 / np.square(truth - after).mean())
    assert record(here / "restored")["images"]["9"]["psnr"] == pytest.approx(psnr)
    rows = 4 if task[0] == "deblur" else 3  # a blurred image is another than its pseudo-inverse
    assert task[0] == "compressed-sensing" or Image.open(here / "restored" / "comparison.png").size[1] == 2 * (2 + rows * 34)


def test_folders_called_by_the_classes_names(run, clothes, here):
    for number, name in ((0, "T-shirt"), (9, "ankle boot")):
        shutil.copytree(clothes / f"{number}", here / "named" / name)
    options = ("--task", "deblur", "--sigma", 1, "--steps", 1, "--model", "fashion-mnist", "--quiet")
    for data, classes, out in (("named", [], "a"), (clothes / "9", ["--class", "ankle boot"], "b")):
        assert run(*options, data, *classes, "--out", out) == (0, "", "")
    assert [record(here / out)["settings"]["class"] for out in "ab"] == ["0,9", "9"]


def test_a_blurred_file_is_sharper_afterwards(run, clothes, here):
    blur = Blur((32, 32), 1.0)
    truth = picture(clothes / "9" / "9.png")
    blurred = to_uint8(blur(torch.tensor(truth / 127.5 - 1).float()[None, None]))[0, ..., 0]
    Image.fromarray(blurred).save(here / "boot.png")
    options = ["--class", 9, "--steps", 10, "--model", "fashion-mnist"]
    assert run("--task", "deblur", "--sigma", 1, "boot.png", *options)[0] == 0
    before, after = (np.square(image - truth).mean() for image in (blurred, picture(here / "restored" / "boot.png")))
    assert after < before / 4


def test_noise_is_added_where_images_are_degraded(run, clothes, here):
    options = [clothes, "--model", "fashion-mnist", "--degrade", "--steps", 2, "--quiet"]
    options += ["--task", "inpaint", "--rectangle", "0,0,8,8"]
    run(*options, "--noise-std", 0.2)
    added = record(here / "restored")["images"]["9"]["psnr_of_pseudo_inverse"]
    run(*options, "--out", "clean")
    assert added < record(here / "clean")["images"]["9"]["psnr_of_pseudo_inverse"] - 1


def test_an_interrupted_job_goes_on_to_the_same_files(run, checkpoint, here, interrupted):
    photos = save(here / "photos", 16)
    options = [photos, "--task", "inpaint", "--rectangle", "2,2,9,9", "--model", checkpoint, "--steps", 1, "--batch-size", 2]
    assert run(*options, "--out", "whole")[0] == 0
    # The record; figures and two pictures; figures and one; comparison.png; the finished record; and then nothing more.
    for moment in range(9):
        with interrupted(moment):
            code, _, err = run(*options, "--out", f"o{moment}", "--quiet")
        assert code == (130 if moment < 8 else 0) and err.count("stopped: ") == err.count("\n") == (0 < moment < 8)
        code, out, _ = run(*options, "--out", f"o{moment}")
        assert code == 0 and contents(here / f"o{moment}") == contents(here / "whole")
        assert ("is finished" in out) == (moment == 8) and ("images restored" in out) == (moment < 8)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["inpaint", "photos", "--mask", "small.png"], "photos/a.png is 16x16 pixels and --mask small.png 8x8; a mask has"),
        (["colorize", "photos", "--resize", "squeeze"], "invalid choice: 'squeeze'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(arguments, message, run, checkpoint, here):
    save(here / "photos", 16, names="ab")
    Image.new("L", (8, 8), 255).save(here / "small.png")
    before = sorted(here.rglob("*"))
    code, out, err = run("--task", *arguments, "--model", checkpoint, "--steps", 1)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert sorted(here.rglob("*")) == before


def test_the_same_folder_takes_no_other_job(run, checkpoint, here):
    photos = save(here / "photos", 16)
    options = ["--task", "inpaint", "--rectangle", "0,0,8,8", photos, "--model", checkpoint, "--steps", 1, "--out", "restored"]
    assert run(*options)[0] == 0
    for changed, message in ((["--eta", 0.5], "--eta 1.0, not 0.5"), (["--num-images", 2], "IMAGES sha256:")):
        code, out, err = run(*options, *changed)
        assert code == 2 and f"restored was begun with {message}" in err and out == ""
    assert "is finished" in run(*options)[1]


def test_images_of_one_name_are_told_apart_and_none_takes_an_overviews(run, checkpoint, here):
    for folder in ("a", "b"):
        save(here / folder, 16, names=["x"])
    Image.new("L", (16, 16)).save(here / "comparison.png")
    options = ["--task", "colorize", "--model", checkpoint, "--steps", 1, "--quiet"]
    assert run("a", "b", "comparison.png", *options) == (0, "", "")
    assert names_in(here / "restored") == ["comparison-2.png", "comparison.png", "record.json", "x-2.png", "x.png"]
    assert run("a", *options) == (0, "", "")
    assert names_in(here / "restored-2") == ["comparison.png", "record.json", "x.png"]


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
