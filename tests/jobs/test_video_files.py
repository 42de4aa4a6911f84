import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from ddim_fast.jobs.outputs import Batches
from ddim_fast.jobs.video_files import VideoFile, _write_gif, frame_rate, read_frames


def moving_square(count=5, colours=3):
    """(count, 32, 32, colours): one on a background that varies a little."""
    rows, columns = np.mgrid[:32, :32]
    frames = np.repeat((40 + rows + columns).astype(np.uint8)[None, ..., None], count, axis=0).repeat(colours, axis=3)
    for i, frame in enumerate(frames):
        frame[8:16, 3 * i : 3 * i + 8] = 220
    return frames


def write(path, frames, rate=10.0):
    output = VideoFile(path, Batches(range(len(frames)), None, 2, frames.shape[1:]), rate)
    output.begin({"settings": {}})
    for k in range(len(output.batches)):
        output.write(k, frames[output.batches.part(k)])
    output.finish()


def read(path, mode="RGB"):
    return np.stack([np.asarray(frame.convert(mode)) for frame in read_frames(path)]).astype(int)


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for number in (10, 9, 1):
        Image.new("L", (4, 4), number).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").touch()
    assert read(tmp_path, "L")[:, 0, 0].tolist() == [1, 9, 10]
    assert frame_rate(tmp_path) is None


@pytest.mark.parametrize("rate", [10.0, 25.0, 50.0])
def test_a_grey_gif_is_exact(rate, tmp_path):
    frames = moving_square(colours=1)
    write(tmp_path / "a.gif", frames, rate)
    np.testing.assert_array_equal(read(tmp_path / "a.gif", "L"), frames[..., 0])
    assert frame_rate(tmp_path / "a.gif") == rate
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("colours", [1, 3])
def test_an_mp4_comes_back_but_for_its_compression(colours, tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    frames = moving_square(colours=colours)
    write(tmp_path / "a.mp4", frames, 7.5)
    again = read(tmp_path / "a.mp4")
    assert again.shape == (5, 32, 32, 3) and frame_rate(tmp_path / "a.mp4") == 7.5
    assert np.abs(again - frames).mean() < 2 and np.abs(again - frames).max() < 16
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_film_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no frames at 'nowhere'"):
        list(read_frames(Path("nowhere")))
    (tmp_path / "a.gif").write_text("no film")
    with pytest.raises(ValueError, match=r"a\.gif: not a readable GIF"):
        list(read_frames(tmp_path / "a.gif"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    (tmp_path / "a.mp4").write_text("no film")
    for read_or_write in (lambda: list(read_frames(tmp_path / "a.mp4")), lambda: write(tmp_path / "b.mp4", moving_square())):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'ddim_fast\[video\]'"):
            read_or_write()
    monkeypatch.undo()
    pytest.importorskip("imageio_ffmpeg")
    with pytest.raises(ValueError, match=r"a\.mp4: not a readable video"):
        list(read_frames(tmp_path / "a.mp4"))


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    write(tmp_path / "a.gif", moving_square())
    with pytest.raises(ValueError, match=r"--out .*a\.gif exists; name another file"):
        VideoFile(tmp_path / "a.gif", Batches(range(5), None, 2, (32, 32, 3)), 10).check(None, {})


@pytest.mark.parametrize("rate", [7.5, 30, 40, 50])
def test_a_gif_lasts_as_long_as_its_frames(rate, tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (77, 8, 8, 1), dtype=np.uint8)
    _write_gif(tmp_path / "film.gif", frames, rate)
    with Image.open(tmp_path / "film.gif") as film:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
    assert sum(durations) == pytest.approx(1000 * 77 / rate, abs=6) and max(durations) - min(durations) <= 10


def test_a_gif_of_too_few_frames_a_second_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"for 655\.35 s at most; 0\.001 a second is too few"):
        VideoFile(tmp_path / "film.gif", Batches(range(2), None, 2, (8, 8, 3)), 0.001)


def test_a_gif_that_ends_too_early_is_named(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    _write_gif(tmp_path / "whole.gif", frames, 10)
    data = (tmp_path / "whole.gif").read_bytes()
    for length in range(7, len(data) - 1, 13):
        (tmp_path / "cut.gif").write_bytes(data[:length])
        with contextlib.suppress(ValueError):  # some of it can be read
            list(read_frames(tmp_path / "cut.gif"))
        with contextlib.suppress(ValueError):
            frame_rate(tmp_path / "cut.gif")
    (tmp_path / "cut.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"cut\.gif: not a readable GIF"):
        frame_rate(tmp_path / "cut.gif")


def test_a_film_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.gif", moving_square())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)  # as large as one frame, not four
    with pytest.raises(
        ValueError, match=r"a\.gif: not a readable GIF \(32x32 pixels are more than 512, the most that are decoded"
    ):
        frame_rate(tmp_path / "a.gif")


def test_what_is_transparent_in_a_gif_is_white(tmp_path):
    frames = [Image.new("P", (8, 8), number) for number in (1, 0, 1)]
    for frame in frames:
        frame.putpalette(bytes(3) + b"\x10\x20\x30")
        frame.putpixel((0, 0), 0)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], transparency=0, disposal=2)
    film = read(tmp_path / "a.gif")
    assert (film[:, 0, 0] == 255).all() and film[0, 5, 5].tolist() == [0x10, 0x20, 0x30]
