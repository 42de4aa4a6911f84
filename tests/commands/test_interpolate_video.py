import functools
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ddim_fast import interpolate
from ddim_fast.jobs.video_files import frame_rate, read_frames


@pytest.fixture
def run(run_here):
    return functools.partial(run_here, interpolate)


@pytest.fixture
def clip(here):
    """A folder with five frames of a moving square."""
    (here / "clip").mkdir()
    for i in range(5):
        frame = np.full((16, 16, 3), 60, np.uint8)
        frame[4:9, 2 * i : 2 * i + 5] = (200, 150, 30)
        Image.fromarray(frame).save(here / "clip" / f"{i}.png")
    return here / "clip"


def frames(path):
    return [np.asarray(frame.convert("RGB")).astype(int) for frame in read_frames(path)]


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def test_a_folder_keeps_its_frames(run, checkpoint, clip, here):
    code, out, _ = run("--video", clip, "--factor", 4, "--model", checkpoint, "--steps", 2, "--class", 3, "--out", "o")
    assert code == 0 and out == "17 frames, 12 of them new; see o\n"
    assert [path.name for path in sorted((here / "o").iterdir())] == [*(f"{i:06d}.png" for i in range(17)), "record.json"]
    new, given = frames(here / "o"), frames(clip)
    np.testing.assert_array_equal(new[::4], given)
    assert all((frame != other).any() for frame, other in itertools.pairwise(new))
    record = json.loads((here / "o" / "record.json").read_text())
    assert record["finished"] and record["settings"]["factor"] == 4 and record["settings"]["class"] == 3


def test_a_film_of_another_size_is_resized_with_a_line_that_says_so(run, checkpoint, clip, here):
    for file in clip.iterdir():
        Image.open(file).resize((60, 20)).save(file)
    options = ["--video", clip, "--model", checkpoint, "--steps", 1]
    done = f"{clip}, 60x20, was brought to 16x16: "
    _, _, err = run(*options, "--out", "a")
    assert f"{done}cropped to a square in the middle and resized (--resize names another way)\n" in err
    _, _, err = run(*options, "--resize", "pad", "--out", "b")
    assert f"{done}resized into a black frame" in err and not frames(here / "b")[0][:5].any()
    assert run(*options, "--resize", "stretch", "--out", "c", "--quiet") == (0, "", "")
    code, _, err = run(*options, "--out", "c")
    assert code == 2 and "c was begun with --resize stretch, not crop" in err


def test_from_an_mp4_to_an_mp4(run, checkpoint, clip, here):
    pytest.importorskip("imageio_ffmpeg")
    options = ["--model", checkpoint, "--steps", 1, "--quiet"]
    assert run("--video", clip, *options, "--fps", 6, "--out", "a.mp4") == (0, "", "")
    assert run("--video", "a.mp4", *options, "--factor", 3, "--out", "b.mp4") == (0, "", "")
    assert frame_rate(here / "b.mp4") == 18 and len(frames(here / "b.mp4")) == 25
    again = np.stack(frames(here / "b.mp4")[::3]) - np.stack(frames(here / "a.mp4"))
    assert np.abs(again).mean() < 3
    assert sorted(path.name for path in here.iterdir()) == ["a.mp4", "b.mp4", "clip"]


def test_a_gif_of_more_frames_than_it_can_show_a_second_lasts_longer(run, checkpoint, clip, here):
    code, _, err = run("--video", clip, "--factor", 10, "--model", checkpoint, "--steps", 1, "--out", "o.gif")
    assert code == 0 and "it will last 2.4 times as long" in err and frame_rate(here / "o.gif") == 50


@pytest.mark.parametrize("out", ["o", "o.gif"])
def test_an_interrupted_job_goes_on_to_the_same_frames(out, run, checkpoint, clip, here, interrupted):
    options = ["--video", clip, "--model", checkpoint, "--steps", 1, "--batch-size", 4, "--out"]
    assert run(*options, out)[0] == 0
    whole, part = here / out, here / f"part-{out}"
    # The record; nine frames; the finished record, or the file.
    for moment in (0, 1, 6, 10):
        with interrupted(moment):
            code, _, err = run(*options, part.name, "--quiet")
        assert code == 130 and (moment == 0 or f"holds {4 * ((moment - 1) // 4) + (moment == 10)} of 9 frames" in err)
        code, said, told = run(*options, part.name)
        assert code == 0 and said.endswith(f"9 frames, 4 of them new; see {part.name}\n")
        assert ("continuing" in told) == (moment > 4)
        assert contents(part) == contents(whole)
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert sorted(path.name for path in here.iterdir()) == sorted(["clip", out])


def test_the_same_folder_takes_no_other_job(run, checkpoint, clip, here):
    options = ["--video", clip, "--model", checkpoint, "--steps", 1, "--out", "o"]
    before = run(*options), contents(here / "o")
    assert run(*options)[:2] == before[0][:2] and contents(here / "o") == before[1]
    code, _, err = run(*options, "--factor", 3)
    assert code == 2 and "o was begun with --factor 2, not 3" in err
    (clip / "4.png").unlink()
    code, _, err = run(*options)
    assert code == 2 and "o was begun with --video sha256:" in err
