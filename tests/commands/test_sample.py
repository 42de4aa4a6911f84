import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ddim_fast import UNet, sample


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, sample)


def test_writes_an_image_a_seed_and_a_grid(run, checkpoint, tmp_path):
    code, out, err = run("--model", checkpoint, "--steps", 2, "--seeds", "0-2,40", "--out", tmp_path / "o", "--batch-size", 3)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "000040.png",
        "grid.png",
        "record.json",
    ]
    assert Image.open(tmp_path / "o" / "000040.png").size == (16, 16)
    assert Image.open(tmp_path / "o" / "grid.png").size == ((4 * 18 + 2) * 4, (18 + 2) * 4)
    assert "4 images of 2 steps" in out and "images/s" in out and "network evaluations/s" in out and "warm-up" in out
    assert "4/4 images" in err and "4 images of 2 steps" in err and "this will take about 1 s" in err


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
    monkeypatch.setattr("ddim_fast.ops.devices.bf16_is_fast", lambda device: fast)
    monkeypatch.setattr("torch.compile", lambda function, **settings: function)
    code, out, _ = run("--model", checkpoint, "--steps", 1, "--seeds", "0,1", *options)
    assert code == 0 and f", {dtype}: " in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options,faster,fast,reasons",
    [
        ([], {"conv3x3"}, True, "eager, since this package's C++ operators are faster here than torch.compile"),
        ([], {"conv3x3"}, False, "than torch.compile; float32, since this processor is not fast at bfloat16"),
        ([], {"conv3x3", "captured"}, False, "--compile: float32, since this processor is not fast at bfloat16"),
        (["--dtype", "float32"], {"conv3x3", "captured"}, True, None),
        (["--engine", "eager", "--dtype", "float32"], {"conv3x3"}, False, None),
        (["--engine", "eager"], {"conv3x3"}, True, None),
    ],
)
def test_a_run_with_compile_that_is_not_compiled_says_why(options, faster, fast, reasons, run, checkpoint, monkeypatch):
    monkeypatch.setattr("ddim_fast.engine.is_faster_in_cpp", lambda operator, *others: operator in faster)
    monkeypatch.setattr("ddim_fast.ops.devices.bf16_is_fast", lambda device: fast)
    command = ["--model", checkpoint, "--seeds", "0", "--steps", "1", "--device", "cpu", *options]
    code, _, err = run(*command, "--compile")
    assert code == 0 and (reasons in err if reasons else "--compile: " not in err)
    assert err.count("--compile: ") == (reasons is not None)
    assert "--compile: " not in run(*command, "--out", "without")[2]
    assert run(*command, "--compile", "--quiet", "--out", "quiet")[2] == ""


@pytest.mark.slow
def test_without_a_compiler_the_fastest_execution_is_a_slower_one(checkpoint, tmp_path):
    """Where torch.compile would serve, because the native operators do not."""
    out = tmp_path / "out"
    options = ["--model", checkpoint, "--compile", "--steps", 2, "--seeds", 0, "--out", out]
    command = [sys.executable, "-m", "ddim_fast.sample", *map(str, options)]
    missing = {"DDIM_FAST_CPU": "baseline", "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | missing)
    assert done.returncode == 0 and (out / "000000.png").exists(), done.stderr
    assert "torch.compile does not work here" in done.stderr and "No working C++ compiler" in done.stderr


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


NAMES = ["airplane", "car", "bird", "cat/tabby", "deer", "dog", "frog", "cat/wild", "3-5", "truck"]


def test_classes_are_called_by_name(run, checkpoint, tmp_path):
    _change_config(checkpoint, class_names=NAMES)
    common = ("--model", checkpoint, "--steps", 2, "--seeds", "0-3", "--quiet", "--out", tmp_path / "out")
    assert run(*common, "--class", "Cat, 1-2") == (0, "", "")
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["settings"]["class"] == "3,7,1-2"
    images = contents(tmp_path / "out")
    (tmp_path / "out" / "000002.png").unlink()  # whoever writes the same in other words goes on with it
    assert run(*common, "--class", "3,cat/wild,car,2") == (0, "", "")
    assert contents(tmp_path / "out") == images
    code, _, err = run(*common, "--class", "3-5")  # a name, not a range
    assert code == 2 and "was begun with --class 3,7,1-2, not 8;" in err
    code, _, err = run(*common, "--class", "car,brid")
    assert code == 2 and err.count("\n") == 1
    assert "--class: no class is called 'brid'; did you mean 'bird'? There are airplane, car, bird," in err


def test_guidance_in_an_interval(run, checkpoint, tmp_path):
    common = ("--model", checkpoint, "--spacing", "900,600,300", "--seeds", "0,1")
    images = {}
    for name, *options in (
        ("none",),
        ("all", "--guidance", 4),
        ("some", "--guidance", 4, "--guidance-interval", 600, 700),
    ):
        assert run(*common, *options, "--out", tmp_path / name)[0] == 0
        images[name] = (tmp_path / name / "000001.png").read_bytes()
    assert len(set(images.values())) == 3


def test_a_guide_is_another_model(run, checkpoint, tmp_path):
    options = ["--model", checkpoint, "--steps", 2, "--seeds", "0,1", "--quiet"]
    assert run(*options, "--out", tmp_path / "plain")[0] == 0
    # Away from itself leads nowhere.
    assert run(*options, "--out", tmp_path / "o", "--guide", checkpoint, "--guidance", 2) == (0, "", "")
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert json.loads((tmp_path / "o/record.json").read_text())["guide"] == str(checkpoint)


def test_steps_are_as_many_as_are_listed(run, checkpoint, tmp_path):
    options = ["--model", checkpoint, "--spacing", "900,400,0", "--seeds", 0, "--out", tmp_path / "o"]
    assert "1 image of 3 steps" in run(*options)[1]
    assert json.loads((tmp_path / "o/record.json").read_text())["settings"]["steps"] == 3


def test_the_reference_spacing_says_how_many_steps_it_makes(run, checkpoint):
    _, out, _ = run("--model", checkpoint, "--steps", 300, "--spacing", "ermongroup-uniform", "--seeds", "0", "--class", "none")
    assert "gives 334 timesteps for 300 steps" in out


def _change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def in_turn(*options):
    """The options of a small job: five images in three batches."""
    return ["--steps", 2, "--eta", 1, "--num-images", 5, "--batch-size", 2, *options]


def contents(path) -> dict[str, bytes]:
    """The files of an output folder by name, or the one file."""
    return {p.name: p.read_bytes() for p in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


@pytest.fixture(params=["", ".npz"], ids=["folder", "npz"])
def job(request, run, checkpoint, tmp_path):
    """The options of a small job, the suffix of its output, and what an uninterrupted run of it writes."""
    options = ["--model", checkpoint, *in_turn()]
    whole = tmp_path / f"whole{request.param}"
    assert run(*options, "--out", whole)[0] == 0
    return options, request.param, contents(whole)


def test_an_npz_file_holds_the_images_of_the_folder(run, checkpoint, tmp_path):
    for out in ("a", "a.npz"):
        assert run("--model", checkpoint, *in_turn("--class", "3,1"), "--out", tmp_path / out)[0] == 0
    with np.load(tmp_path / "a.npz") as npz:
        assert npz["arr_0"].shape == (5, 16, 16, 3) and npz["arr_1"].tolist() == [3, 1, 3, 1, 3]
        for seed, picture in enumerate(npz["arr_0"]):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a" / f"{seed:06d}.png")), picture)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.npz", "checkpoint", "here"]


def test_images_that_are_no_pictures_go_into_an_npz_file(run, small_config, tmp_path):
    UNet(dataclasses.replace(small_config, in_channels=4)).save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--steps", 1, "--seeds", "0,1", "--quiet"]
    code, _, err = run(*options)
    assert code == 2 and "images of 4 channels are no pictures, which have 1 or 3; name --out FILE.npz" in err
    assert run(*options, "--out", tmp_path / "o.npz") == (0, "", "")
    assert np.load(tmp_path / "o.npz")["arr_0"].shape == (2, 16, 16, 4)


def test_num_images_are_the_first_seeds(run, checkpoint, tmp_path):
    run("--model", checkpoint, "--steps", 1, "--num-images", 3, "--out", tmp_path / "a")
    run("--model", checkpoint, "--steps", 1, "--seeds", "0-2", "--out", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_npz_file_has_a_grid_where_one_is_asked_for(run, checkpoint, tmp_path):
    run("--model", checkpoint, *in_turn("--out", tmp_path / "a", "--grid", tmp_path / "a.png"))
    run("--model", checkpoint, *in_turn("--out", tmp_path / "a.npz", "--grid", tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not (tmp_path / "a" / "grid.png").exists()


def test_a_grid_shows_the_first_sixty(run, checkpoint, tmp_path):
    run("--model", checkpoint, "--steps", 1, "--num-images", 65, "--batch-size", 25, "--out", tmp_path / "a")
    assert Image.open(tmp_path / "a" / "grid.png").size == ((10 * 18 + 2) * 4, (6 * 18 + 2) * 4)


# A process is forked for each of the moments at which a file comes to its place, runs the command, and is killed just before
# that moment; until one gets through.
_KILLED = """
import os, signal, sys
from ddim_fast import sample
from ddim_fast.cli.parser import run_command

out, *sys.argv[1:] = sys.argv[1:]
sys.argv += ["--quiet", "--out", out.replace("#", "0")]
sample.main()  # what is imported at first use is imported once
replace, moment, status = os.replace, 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    moment += 1
    child = os.fork()
    if child == 0:
        to_come = moment
        def replace_or_die(*places):
            global to_come
            to_come -= 1
            if to_come == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*places)
        os.replace = replace_or_die
        sys.argv[-1] = out.replace("#", str(moment))
        run_command(sample.main)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(moment, status)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(job, run, tmp_path):
    options, suffix, whole = job
    out = tmp_path / f"killed-#{suffix}"
    # One thread: a process that has started others must not be forked. Torch has some that wait, of which Python 3.12 warns.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _KILLED, out, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, env=environment)
    # The record, five images, the grid and the record again; or the record, three batches and the file.
    moments = 5 if suffix else 8
    assert (killed.stdout, killed.stderr) == (f"{moments + 1} 0\n", "")
    for moment in range(moments + 2):
        place = tmp_path / out.name.replace("#", str(moment))
        finished = moment in (0, moments + 1)
        code, said, told = run(*options, "--out", place)
        assert code == 0 and contents(place) == whole
        assert ("is finished" in said) == finished
        assert ("continuing" in told) == (2 + (not suffix) < moment <= moments)
    outputs = {f"killed-{moment}{suffix}" for moment in range(moments + 2)}
    assert {p.name for p in tmp_path.iterdir()} == {*outputs, f"whole{suffix}", "checkpoint", "here"}


@pytest.fixture
def ctrl_c():
    """SIGINT as in the foreground: what a shell starts in the background ignores it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_an_interrupted_run_says_how_to_go_on(run, checkpoint, tmp_path, monkeypatch, ctrl_c):
    options = ["--model", checkpoint, "--steps", 2, "--num-images", 24, "--batch-size", 1, "--out"]
    run(*options, tmp_path / "whole")
    replace, calls = os.replace, []

    def interrupt(*places):
        replace(*places)
        calls.append(places)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        code, out, err = run(*options, tmp_path / "parts", "--quiet")
    assert code == 130 and out == "" and err.count("\n") == 3
    assert err.startswith("\nstopping after this batch; Ctrl-C again ends at once\n")
    holds = int(re.search(r"stopped: .*parts holds (\d+) of 24 images; the same command continues it", err)[1])
    assert 3 <= holds < 24 and holds == len(list((tmp_path / "parts").glob("0*.png")))
    code, out, err = run(*options, tmp_path / "parts")
    assert code == 0 and f"parts holds {holds} of 24 images; continuing" in err and f"{24 - holds} images of 2 steps in" in out
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(job, tmp_path):
    options, suffix, whole = job
    out = tmp_path / f"two{suffix}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ddim_fast.sample"]
    command += [*options, "--out", out]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images of 2 steps") == 1 and done.stderr.count("5/5 images") >= 1
    assert contents(out) == whole


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_an_unfinished_output_is_completed(damage, job, run, checkpoint, tmp_path):
    options, suffix, whole = job
    out = tmp_path / f"out{suffix}"
    folder = out.with_name("out.npz.partial") if suffix else out

    class Stop(BaseException):
        pass

    replace = os.replace

    def stop(source, place):
        if str(place).endswith(("grid.png", "out.npz")):
            raise Stop
        replace(source, place)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "replace", stop)
        run(*options, "--out", out)
    last = max(folder.glob("batch-*" if suffix else "0*.png"))
    last.write_bytes(last.read_bytes()[:-9])
    if damage == "gone":
        last.unlink()
    code, said, told = run(*options, "--out", out)
    assert code == 0 and "out" in said and "holds 4 of 5 images; continuing" in told
    assert contents(out) == whole


@pytest.mark.parametrize(
    "changes,message",
    [
        (["--steps", 3], "--steps 2, not 3;"),
        (["--eta", 0.5], "--eta 1.0, not 0.5;"),
        (["--num-images", 6], "--seeds 0-4, not 0-5;"),
        (["--batch-size", 3], "--batch-size 2, not 3;"),
        (["--guidance", 2], "--guidance none, not 2.0;"),
        (["--clip", 1], "--clip none, not 1.0;"),
        (["--class", "3,5"], "--class all, not 3,5;"),
        (["--class", "none"], "--class all, not none;"),
        (["--spacing", "leading"], "--spacing quadratic, not leading;"),
        (["--solver", "ddpm", "--eta", 0], "--solver ddim, not ddpm;"),
        (["--dtype", "bfloat16"], "--dtype float32, not bfloat16;"),
        (["--model", "fashion-mnist"], "--model sha256:"),
    ],
)
def test_images_of_other_settings_are_not_added(changes, message, job, run, tmp_path):
    options, suffix, whole = job
    out = tmp_path / f"whole{suffix}"
    code, said, err = run(*options, "--out", out, *changes)
    assert code == 2 and said == "" and err.count("\n") == 1
    assert f"whole{suffix} was begun with {message}" in err
    assert contents(out) == whole


def test_a_finished_output_is_left_as_it_is(job, run, tmp_path):
    options, suffix, whole = job
    out = tmp_path / f"whole{suffix}"
    before = [p.stat().st_mtime_ns for p in ([out] if suffix else out.iterdir())]
    assert run(*options, "--out", out) == (0, f"{out} is finished: it holds these 5 images, made with these settings\n", "")
    assert run(*options, "--out", out, "--quiet") == (0, "", "")
    assert [p.stat().st_mtime_ns for p in ([out] if suffix else out.iterdir())] == before
    assert contents(out) == whole


def test_a_damaged_record_is_one_line(job, run, tmp_path):
    options, suffix, _ = job
    out = tmp_path / f"whole{suffix}"
    (out if suffix else out / "record.json").write_bytes(b"{")
    code, said, err = run(*options, "--out", out)
    assert code == 2 and "record.json" in err and err.count("\n") == 1 and said == ""


def test_images_of_unknown_origin_are_not_added_to(run, checkpoint, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "000003.png")
    code, _, err = run("--model", checkpoint, *in_turn("--out", tmp_path))
    assert code == 2 and "is not empty (000003.png and 2 more); name a folder" in err and err.count("\n") == 1


def test_without_out_each_run_has_a_folder(run, checkpoint, tmp_path):
    here = tmp_path / "here"
    assert "; see samples, samples/grid.png" in run("--model", checkpoint, *in_turn())[1]
    assert "; see samples-2, " in run("--model", checkpoint, *in_turn())[1]
    assert contents(here / "samples") == contents(here / "samples-2")
    record = json.loads((here / "samples-2" / "record.json").read_bytes())
    (here / "samples-2" / "record.json").write_text(json.dumps({**record, "finished": False}))
    (here / "samples-2" / "000003.png").unlink()
    assert "; see samples-3, " in run("--model", checkpoint, *in_turn("--guidance", 2))[1]
    assert "; see samples-2, " in run("--model", checkpoint, *in_turn())[1]
    assert contents(here / "samples") == contents(here / "samples-2")


def test_a_film_is_made_of_a_run_that_goes_on(run, checkpoint, tmp_path):
    options = ["--model", checkpoint, *in_turn("--out", tmp_path / "a")]
    run(*options)
    whole = contents(tmp_path / "a")
    (tmp_path / "a" / "000004.png").unlink()
    assert run(*options, "--trajectory", tmp_path / "film.gif")[0] == 0
    assert Image.open(tmp_path / "film.gif").n_frames == 2 and contents(tmp_path / "a") == whole


def test_a_finished_folder_gets_the_film_and_the_grid_that_are_asked_for(run, checkpoint, tmp_path):
    options = ["--model", checkpoint, "--steps", 2, "--seeds", "0-2", "--batch-size", 2]
    assert run(*options, "--out", tmp_path / "o")[0] == 0
    pictures = {p.name: p.read_bytes() for p in (tmp_path / "o").glob("0*.png")}
    code, _, err = run(*options, "--out", tmp_path / "o", "--trajectory", tmp_path / "f.gif", "--grid", tmp_path / "g.png")
    assert code == 0, err
    assert (tmp_path / "f.gif").exists() and (tmp_path / "g.png").exists()
    assert {p.name: p.read_bytes() for p in (tmp_path / "o").glob("0*.png")} == pictures
    assert run(*options, "--out", tmp_path / "o.npz")[0] == 0
    code, _, err = run(*options, "--out", tmp_path / "o.npz", "--grid", tmp_path / "h.png")
    assert code == 2 and "is finished, and --grid and --trajectory are made while sampling" in err


def test_help_shows_examples_and_defaults(run):
    code, out, _ = run("--help")
    assert code == 0
    assert "examples:" in out and "--class horse --guidance 2" in out
    assert "(default: 12 on a CPU, 64 on a GPU)" in " ".join(out.split())
    assert [title for title in ("sampling:", "execution:", "output:") if f"\n{title}\n" not in out] == []


def test_images_of_classes_are_guided_as_the_card_says(run, small_unet, tmp_path):
    small_unet.config = dataclasses.replace(small_unet.config, guidance=3.0)
    small_unet.save_pretrained(tmp_path / "model")
    options = ["--model", tmp_path / "model", "--steps", 2, "--seeds", "0-2", "--out"]

    def scale(name, *more):
        code, out, err = run(*options, tmp_path / name, *more)
        own = "guidance 3 (the model's own; --guidance 1 turns it off)"
        assert code == 0 and (own in out) == (own in err)
        return json.loads((tmp_path / name / "record.json").read_text())["settings"]["guidance"], own in out

    assert scale("usual") == (3.0, True)
    assert scale("same", "--guidance", 3) == (3.0, True) and contents(tmp_path / "same") == contents(tmp_path / "usual")
    assert scale("plain", "--guidance", 1) == (1.0, False) and contents(tmp_path / "plain") != contents(tmp_path / "usual")
    assert scale("none", "--class", "none") == (None, False)
