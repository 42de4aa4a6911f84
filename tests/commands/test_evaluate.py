import dataclasses
import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import UNet, evaluate
from ddim_fast.evaluation.inception import NAME


@pytest.fixture
def checkpoint(small_unet, tmp_path):
    small_unet.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def coarse_checkpoint(small_unet, small_config, tmp_path):
    """Of a network with a tenth of the timesteps, in which its ODE is solved for comparison."""
    config = dataclasses.replace(small_config, num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)
    coarse = UNet(config)
    coarse.load_state_dict(small_unet.state_dict())
    coarse.save_pretrained(tmp_path / "coarse")
    return tmp_path / "coarse"


@pytest.fixture
def photos(tmp_path):
    """Forty grey images of 16x16 in two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        (tmp_path / "photos" / f"class-{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "photos" / f"class-{i % 2}" / f"{i:02d}.png")
    return tmp_path / "photos"


@pytest.fixture
def run(run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return functools.partial(run_here, evaluate, "--quiet", "--out", tmp_path / "out")


def rows(tmp_path, kind):
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert all(1 <= row["run"] <= len(content["runs"]) for row in content["rows"])
    return [row for row in content["rows"] if row["kind"] == kind]


def test_a_grid_of_settings_is_measured_once(run, checkpoint, photos, tmp_path, tiny_inception):
    (tmp_path / "weights").mkdir()
    command = [
        "--model",
        checkpoint,
        "--reference",
        photos,
        "--inception",
        tmp_path / "weights",
        "--num-images",
        20,
        "--batch-size",
        8,
    ]
    code, out, err = run(*command, "--steps", "1,2", "--solver", "ddim,unipc", "--eta", "0,1", "--tolerance", 0.5)
    assert code == 0, err
    assert out.count("quality: ") == 7 and "FID-20" in out
    found = rows(tmp_path, "quality")
    assert sorted((r["settings"]["solver"] or "", r["settings"]["eta"] or 0, r["evaluations"]) for r in found[:6]) == [
        *(("ddim", eta, steps) for eta in (0.0, 1.0) for steps in (1, 2)),
        ("unipc", 0.0, 1),
        ("unipc", 0.0, 2),
    ]
    for row in found:
        assert row["images"] == 20 and row["label"] == "FID-20" and "FID" not in row and row["FID-20"] >= 0
        assert row["settings"]["seeds"] == "0-19" and 0 <= row["precision"] <= 1 and np.isfinite(row["KID"])
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"### FID-20 against {photos} (40 images)" in table and "| FID-20 |" in table and "--eta 0,1" in table
    if pytest.importorskip("matplotlib"):
        assert Image.open(tmp_path / "out" / "quality.png").size[0] > 400
    assert not list((tmp_path / "out").glob(".parts*"))

    code, out, _ = run(*command, "--steps", "1,2,3")
    assert code == 0 and out.count("quality: ") == 1 and "steps 3" in out
    assert len(rows(tmp_path, "quality")) == 8


def test_guidance_in_an_interval(run, coarse_checkpoint, tmp_path):
    command = ["--model", coarse_checkpoint, "--trajectory-error", "--num-images", 2, "--steps", 3, "--spacing", "linear"]
    for options in ([], ["--guidance", 2], ["--guidance", 2, "--guidance-interval", 40, 60]):
        code, _, err = run(*command, *options)
        assert code == 0, err
    none, everywhere, between = rows(tmp_path, "trajectory")
    assert [row["evaluations"] for row in (none, everywhere, between)] == [3, 6, 4]
    assert len({row["error"] for row in (none, everywhere, between)}) == 3
    assert between["settings"]["guidance_interval"] == [40, 60] and "guidance_interval" not in everywhere["settings"]


def test_num_images_by_its_former_name(run, coarse_checkpoint, tmp_path):
    code, _, err = run("--model", coarse_checkpoint, "--trajectory-error", "--num", 2, "--steps", 1, "--quiet")
    assert (code, err) == (0, "warning: --num is now --num-images\n")
    assert rows(tmp_path, "trajectory")[0]["settings"]["seeds"] == "0-1"
    assert "--num " not in run("--help")[1]


def test_a_guide_is_part_of_the_settings(run, coarse_checkpoint, tmp_path):
    torch.manual_seed(1)
    UNet(UNet.from_pretrained(coarse_checkpoint).config).save_pretrained(tmp_path / "guide")
    command = ["--model", coarse_checkpoint, "--trajectory-error", "--num-images", 2, "--steps", 3, "--guidance", 2]
    for options in ([], ["--guide", tmp_path / "guide"], ["--guide", coarse_checkpoint]):
        code, _, err = run(*command, *options)
        assert code == 0, err
    itself, guided, nowhere = rows(tmp_path, "trajectory")
    assert [row["evaluations"] for row in (itself, guided, nowhere)] == [6, 3, 3]
    assert len({row["error"] for row in (itself, guided, nowhere)}) == 3
    assert guided["settings"]["guide"] == str(tmp_path / "guide")
    assert guided["settings"]["guide weights"] != nowhere["settings"]["guide weights"] == nowhere["settings"]["weights"]


def test_another_batch_size_does_not_read_the_solutions_of_this_one(run, coarse_checkpoint, tmp_path):
    command = ["--model", coarse_checkpoint, "--trajectory-error", "--num-images", 6, "--steps", 2]
    errors = []
    for size in (2, 4, 2):
        assert run(*command, "--batch-size", size)[0] == 0
        errors.append(rows(tmp_path, "trajectory")[0]["error"])
        shutil.rmtree(tmp_path / "out")
    assert errors == pytest.approx([errors[0]] * 3, rel=1e-4)


def test_changed_data_are_measured_anew(run, checkpoint, photos, tmp_path):
    command = ["--model", checkpoint, "--data", photos, "--loss"]
    assert run(*command)[0] == 0
    Image.new("L", (16, 16), 255).save(photos / "class-0" / "00.png")
    assert run(*command)[0] == 0
    before, after = rows(tmp_path, "loss")
    assert before["loss"] != after["loss"]
    table = (tmp_path / "out" / "evaluation.md").read_text()
    for row in (before, after):  # they have one name
        assert f"Squared error of epsilon on {photos} ({row['settings']['data content'][:8]})\n" in table


def test_changed_classes_are_measured_anew(run, checkpoint, photos, tmp_path):
    """The images are the same, and the network is told other classes."""
    command = ["--model", checkpoint, "--data", photos, "--loss"]
    (photos / "class-0").rename(photos / "0")
    for before, after in (("class-1", "1"), ("1", "7")):
        (photos / before).rename(photos / after)
        assert run(*command)[0] == 0
    before, after = rows(tmp_path, "loss")
    assert before["loss"] != after["loss"]


def test_classes_that_are_called_by_name_are_the_same(run, checkpoint, photos, tmp_path):
    config, names = checkpoint / "config.json", [f"kind {i}" for i in range(10)]
    config.write_text(json.dumps({**json.loads(config.read_text()), "class_names": names}))
    command = ["--model", checkpoint, "--data", photos, "--loss"]
    for folders in (("4", "7"), ("Kind 4", "kind 7")):
        for before, after in zip(sorted(photos.iterdir()), folders, strict=True):
            before.rename(photos / after)
        assert run(*command)[0] == 0
    assert len(rows(tmp_path, "loss")) == 1  # images and classes are those that have been measured
    samples = ["--model", checkpoint, "--trajectory-error", "--num-images", 2, "--steps", 2, "--batch-size", 2]
    for classes in ("7,4", "Kind 7,kind 4"):
        assert run(*samples, "--class", classes)[0] == 0
    (row,) = rows(tmp_path, "trajectory")
    assert row["settings"]["class"] == "7,4"


def test_precision_and_recall_do_not_depend_on_the_order_of_the_reference(run, tmp_path, tiny_inception):
    rng = np.random.default_rng(0)
    kinds = [rng.integers(*limits, (300, 16, 16, 3), dtype=np.uint8) for limits in ((0, 120), (136, 256))]
    np.savez(tmp_path / "images.npz", arr_0=np.concatenate([kind[:50] for kind in kinds]))
    np.savez(tmp_path / "sorted.npz", arr_0=np.concatenate([kind[50:] for kind in kinds]))
    command = ["--images", tmp_path / "images.npz", "--reference", tmp_path / "sorted.npz", "--inception", tmp_path]
    code, _, err = run(*command, "--num-images", 100)
    assert code == 0, err
    (row,) = rows(tmp_path, "quality")
    assert row["precision"] > 0.7 and row["recall"] > 0.7


def test_a_single_array_is_no_archive(run, photos, tmp_path, tiny_inception):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros((4, 16, 16, 3), np.uint8))
    code, _, err = run("--images", tmp_path / "a.npz", "--reference", photos, "--inception", tmp_path, "--num-images", 4)
    assert code == 2 and "a.npz: not a whole .npz file (it is a single array" in err


def test_images_are_measured_as_many_as_there_are_or_are_asked_for(run, photos, tmp_path, tiny_inception):
    command = ["--images", photos, "--reference", photos, "--inception", tmp_path]
    for options in ([], ["--num-images", 40]):
        code, _out, err = run(*command, *options)
        assert code == 0, err
        (row,) = rows(tmp_path, "quality")
        assert row["FID-40"] == pytest.approx(0, abs=1e-6) and (row["precision"], row["recall"]) == (1, 1)
    code, _, err = run(*command, "--num-images", 41)
    assert code == 2 and f"{photos} holds 40 images, fewer than the 41 of --num-images" in err and err.count("\n") == 1
    code, _, err = run("--images", photos / "class-0" / "00.png", *command[2:])
    assert code == 2 and "holds one image; a distribution of images needs at least 2" in err and err.count("\n") == 1


def test_a_run_says_what_it_measures(run_here, checkpoint, photos, tmp_path, tiny_inception, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    to = ["--reference", photos, "--inception", tmp_path, "--out", tmp_path / "out"]
    command = ["--model", checkpoint, "--data", photos, "--loss", *to, "--num-images", 8, "--steps", 1, "--device", "cpu"]
    code, _, err = run_here(evaluate, *command)
    parameters = sum(p.numel() for p in UNet.from_pretrained(checkpoint).parameters())
    assert code == 0 and err.startswith(
        f"{checkpoint}: {parameters:,} parameters, float32 on cpu\n"
        "operators: PyTorch (conv3x3, group_norm_silu, attention, ddim_step)\n"
        "images: 8 for --reference, 8 for --data\n"
    )
    assert "comparing the features of 8 images with the reference's\n" in err
    code, _, err = run_here(evaluate, "--images", photos, *to, "--device", "cpu")
    assert code == 0 and err.startswith(f"images: {photos}, 40 of 16x16 grey\nfeatures: {NAME} on cpu\n")


@pytest.mark.parametrize(
    "options,words",
    [
        (["--reference", "nowhere", "--inception", "."], "no images at 'nowhere'"),
        (["--reference", "photos", "--inception", "absent"], "there is no feature network at absent"),
        (["--reference", "small.npz", "--inception", "."], "statistics of 5 features"),
        (["--data", "nowhere", "--loss"], "no images at 'nowhere'"),
        (["--trajectory-error", "--guidance", "2", "--guidance-interval", "600", "300"], "the lower one first"),
    ],
)
def test_what_cannot_be_measured_is_said_before_timesteps_are_fitted(
    options, words, run, checkpoint, photos, tmp_path, tiny_inception, monkeypatch
):
    np.savez(tmp_path / "small.npz", mu=np.zeros(5), sigma=np.eye(5))
    monkeypatch.setattr("ddim_fast.cli.evaluation.fit_timesteps", lambda *_, **__: pytest.fail("fitted"))
    code, _, err = run("--model", checkpoint, "--fit-timesteps", *options, where=tmp_path)
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_folder_of_another_size_and_colour_is_compared_as_it_is(run, tmp_path, tiny_inception):
    """Made grey, the coloured pictures would be the images themselves, at no distance; in a frame, the small ones far away."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8) // np.array([1, 3, 9], np.uint8)
    for i, picture in enumerate(map(Image.fromarray, pixels)):
        grey = picture.convert("L")
        for name, stored in (
            ("images", grey),
            ("coloured", picture),
            ("large", grey.resize((48, 48), Image.Resampling.NEAREST)),
            ("small", grey.resize((8, 8), Image.Resampling.BOX)),
        ):
            (tmp_path / name).mkdir(exist_ok=True)
            stored.save(tmp_path / name / f"{i:02d}.png")
    fid = {}
    for name in ("coloured", "large", "small"):
        command = ["--images", tmp_path / "images", "--reference", tmp_path / name, "--inception", tmp_path, "--num-images", 40]
        code, _, err = run(*command)
        assert code == 0, err
        fid[name] = rows(tmp_path, "quality")[-1]["FID-40"]
    assert fid["large"] < 0.05 * fid["coloured"] and fid["small"] < 0.05 * fid["coloured"]
    table = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"{tmp_path / 'coloured'} (40 images), 16x16 RGB\n" in table and "large (40 images), 48x48 grey\n" in table


def test_another_feature_network_has_rows_and_references_of_its_own(run, photos, tmp_path, tiny_inception):
    """The folder is at no distance from itself, whichever network saw it first."""
    command = ["--images", photos, "--reference", photos, "--num-images", 40]
    for option in (tmp_path, f"mine={tmp_path}", tmp_path):
        code, _, err = run(*command, "--inception", option)
        assert code == 0, err
    first, other = rows(tmp_path, "quality")
    assert first["FID-40"] == pytest.approx(0, abs=1e-6) and other["FID-40"] == pytest.approx(0, abs=1e-6)
    assert (first["settings"]["features"], other["settings"]["features"]) == (NAME, "mine")
    assert "(40 images)\n" in (table := (tmp_path / "out" / "evaluation.md").read_text())
    assert "(40 images), features of mine\n" in table
    path = tmp_path / "a=b"
    path.mkdir()
    assert run(*command, "--inception", path)[0] == 0 and len(rows(tmp_path, "quality")) == 2  # a path, no name


def test_what_cannot_be_computed_is_said(run, photos, tmp_path, tiny_inception):
    np.savez(tmp_path / "s.npz", mu=np.zeros(6), sigma=np.eye(6))
    for reference, count, words in (
        (tmp_path / "s.npz", 40, f"KID, precision and recall: {tmp_path / 's.npz'} holds only statistics"),
        (photos, 3, "KID, precision and recall: they need more than 3 images a side; there are 3"),
    ):
        code, out, err = run("--images", photos, "--reference", reference, "--inception", tmp_path, "--num-images", count)
        assert code == 0 and f"; not measured: {words}" in out, err
        row = rows(tmp_path, "quality")[-1]
        assert row["not measured"].startswith(words) and "KID" not in row
        assert f"Not measured: {words}" in (tmp_path / "out" / "evaluation.md").read_text()


def test_what_is_done_to_held_out_images_of_another_size_is_said(run_here, checkpoint, photos, tmp_path):
    for file in photos.rglob("*.png"):
        Image.open(file).resize((20, 30)).save(file)
    line = "40 images were brought to 16x16: cropped to a square in the middle and resized\n"
    options = ["--model", checkpoint, "--data", photos, "--loss", "--out", tmp_path / "out"]
    assert line in run_here(evaluate, *options)[2]
    assert line not in run_here(evaluate, *options, "--quiet")[2]


def test_loss_and_reconstruction_of_held_out_images(run, checkpoint, photos, tmp_path):
    code, _out, err = run(
        "--model", checkpoint, "--data", photos, "--loss", "--reconstruction", "--steps", "2,20", "--num-images", 6
    )
    assert code == 0, err
    (loss,) = rows(tmp_path, "loss")
    assert 0.1 < loss["loss"] < 100 and loss["images"] == 6 and loss["loss standard error"] > 0
    assert list(loss["loss by timestep"]) == ["0-9", "10-29", "30-99", "100-299", "300-999"]
    few, many = rows(tmp_path, "reconstruction")
    assert (few["settings"]["steps"], many["settings"]["steps"]) == (2, 20) and many["error"] < few["error"]
    code, _, err = run("--model", checkpoint, "--data", photos, "--reconstruction", "--eta", 1)
    assert code == 2 and "--reconstruction needs deterministic DDIM" in err
    code, _, err = run("--model", checkpoint, "--data", photos, "--loss", "--num-images", 41)
    assert code == 2 and "holds 40 images, fewer than the 41" in err


def test_fitted_timesteps_are_written_and_compared(run, small_config, tmp_path, monkeypatch):

    torch.manual_seed(0)
    config = dataclasses.replace(small_config, num_train_timesteps=25, beta_end=0.3, sample_size=8, attention_resolutions=())
    UNet(config).save_pretrained(tmp_path / "model")
    code, _, err = run("--model", tmp_path / "model", "--trajectory-error", "--steps", 3, "--spacing", "adaptive")
    assert code == 2 and "--fit-timesteps" in err
    monkeypatch.setattr("ddim_fast.diffusion.adaptive._MEASURED", (1, 3))
    monkeypatch.setattr("ddim_fast.cli.evaluation._CALIBRATION_SEEDS", range(1000, 1002))
    command = ["--model", tmp_path / "model", "--fit-timesteps", "--trajectory-error", "--num-images", 4, "--steps", "3,25"]
    code, out, err = run(*command, "--spacing", "linear,adaptive", "--tolerance", 0.1)
    assert code == 0, err
    assert (tmp_path / "model" / "timesteps.json").is_file() and "timesteps.json" in out
    found = {(r["settings"]["spacing"], r["settings"]["steps"]): r for r in rows(tmp_path, "trajectory")}
    assert all(found["linear", 25][name] == 0 for name in ("error", "whitened error", "error standard error"))
    assert found["adaptive", 3]["evaluations"] == 3
    for error in ("error", "whitened error"):
        assert 0 < found["adaptive", 3][f"{error} standard error"] < found["adaptive", 3][error]
    assert found[None, None]["evaluations"] > 1
    code, _, err = run("--model", tmp_path / "model", "--trajectory-error", "--solver", "ddpm")
    assert code == 2 and "deterministic" in err


def test_a_solver_is_fitted_and_compared(run, small_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = dataclasses.replace(small_config, num_train_timesteps=25, beta_end=0.3, sample_size=8, attention_resolutions=())
    UNet(config).save_pretrained(tmp_path / "model")
    code, _, err = run("--model", tmp_path / "model", "--fit-solver", "3,20")
    assert code == 2 and "--fit-solver 20: the steps are at least 2 and fewer than --teacher-steps 20" in err
    code, _, err = run("--model", tmp_path / "model", "--trajectory-error", "--solver", "fitted", "--steps", 3)
    assert code == 2 and "--fit-solver" in err
    monkeypatch.setattr("ddim_fast.cli.evaluation._SOLVER_SEEDS", range(1000, 1008))
    command = ["--model", tmp_path / "model", "--trajectory-error", "--num-images", 4, "--steps", "3"]
    code, out, err = run(
        "--fit-solver", "2,3", "--guidance", 1.5, *command, "--solver", "unipc,fitted", "--spacing", "linear,quadratic"
    )
    assert code == 0 and "3 steps: " in out, err
    found = [row["settings"] for row in rows(tmp_path, "trajectory")]
    assert [(s["solver"], s["spacing"]) for s in found] == [("unipc", "linear"), ("unipc", "quadratic"), ("fitted", "adaptive")]
    stored = json.loads((tmp_path / "model" / "timesteps.json").read_text())
    assert stored["coefficients"].keys() == stored["timesteps"]["fitted"].keys() == {"2", "3"}
    assert (
        stored["calibration"]["fitted"]["3"]["guidance"] == 1.5 and found[2]["timesteps"] == stored["timesteps"]["fitted"]["3"]
    )


def test_each_step_may_have_a_scale_of_guidance(run, small_config, photos, tmp_path, tiny_inception):
    (tmp_path / "weights").mkdir()
    torch.manual_seed(0)
    UNet(dataclasses.replace(small_config, num_classes=3, sample_size=8, attention_resolutions=())).save_pretrained(
        tmp_path / "model"
    )
    command = ["--model", tmp_path / "model", "--reference", photos, "--inception", tmp_path / "weights", "--num-images", 4]
    code, _, err = run(*command, "--steps", "2,3", "--guidance", "1,2")
    assert code == 2 and "--guidance has 2 scales, and --steps 3 takes as many as steps" in err
    code, out, err = run(*command, "--steps", "2", "--guidance", "1,2")
    assert code == 0 and "evaluations 3" in out, err
    assert rows(tmp_path, "quality")[0]["settings"]["guidance"] == [1.0, 2.0]
    assert "| 1,2 |" in (tmp_path / "out" / "evaluation.md").read_text()


def test_fitting_alone_does_not_check_the_default_number_of_steps(run, small_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = dataclasses.replace(small_config, num_train_timesteps=4, sample_size=8, attention_resolutions=())
    UNet(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("ddim_fast.cli.evaluation._CALIBRATION_SEEDS", range(1000, 1002))
    code, out, err = run("--model", tmp_path / "model", "--fit-timesteps")
    assert code == 0 and "timesteps.json" in out, err
    code, _, err = run("--model", tmp_path / "model", "--fit-timesteps", "--trajectory-error")
    assert code == 2 and "--steps must be a whole number from 1 to 4" in err


def test_samples_that_are_not_finite_are_an_error_that_names_the_model(run, small_unet, photos, tmp_path, tiny_inception):
    with torch.no_grad():
        small_unet.conv_out.weight.fill_(3e38)  # finite, as weights have to be
    small_unet.save_pretrained(tmp_path / "broken")
    options = ["--model", tmp_path / "broken", "--reference", photos, "--inception", tmp_path, "--num-images", 8, "--steps", 1]
    code, _, err = run(*options)
    assert code == 1 and f"{tmp_path / 'broken'}: the samples are not finite" in err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(checkpoint, photos, tmp_path):
    launch = [sys.executable, "-m"]
    torchrun = [*launch, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    options = ["ddim_fast.evaluate", "--model", checkpoint, "--data", photos, "--loss", "--batch-size", "8", "--quiet", "--out"]
    found = []
    for name, start in (("one", launch), ("two", torchrun)):
        done = subprocess.run(
            [str(a) for a in (*start, *options, tmp_path / name)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        (row,) = json.loads((tmp_path / name / "evaluation.json").read_text())["rows"]
        found.append(row)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6) and found[0]["images"] == 40
