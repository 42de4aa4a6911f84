"""Reading films from a folder of pictures, a GIF or any file that ffmpeg decodes; writing a GIF or an MP4."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ..data.images import image_files, read_images
from ..io.decoding import check_size, opaque, reason_of
from .outputs import Batches, PngFolder

__all__ = ["GIF_RATE", "VIDEO_SUFFIXES", "VideoFile", "frame_rate", "read_frames"]

VIDEO_SUFFIXES = (".gif", ".mp4")

_REMEDY = "copy or download it again, or give its frames as a folder of pictures"

# The largest frame rate that players show at full speed; and the longest frame, in hundredths of a second: a GIF has two bytes.
GIF_RATE, _LONGEST_GIF_FRAME = 50, 65535


def read_frames(source: Path) -> Iterator[Image.Image]:
    """The frames of a film one by one.

    Args:
        source: a folder of images, in the order of their names (numbers in them count as numbers), a GIF, or a video file,
            which needs ``pip install ddim_fast[video]``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a film, or is damaged; the message names the file.
    """
    if source.is_dir():
        for file in sorted(image_files(source), key=_by_numbers):
            yield from (image for _, image, _ in read_images(str(file)))
    elif not source.is_file():
        raise FileNotFoundError(f"no frames at {str(source)!r}: neither a folder nor a file")
    elif source.suffix.lower() == ".gif":
        yield from (frame.convert("RGB") for frame, _ in _gif_frames(source))
    else:
        decoded, about = _decoded(source)
        width, height = about["size"]
        for frame in decoded:
            yield Image.frombytes("RGB", (width, height), frame)


def frame_rate(source: Path) -> float | None:
    """The frame rate of a source of :func:`read_frames`, in frames per second; a GIF's mean rate; None if unknown, as for a
    folder."""
    if source.is_dir():
        return None
    if source.suffix.lower() == ".gif":
        durations = [milliseconds for _, milliseconds in _gif_frames(source)]
        return 1000 * len(durations) / sum(durations) if sum(durations) else None
    decoded, about = _decoded(source)
    decoded.close()
    return about["fps"]


def _gif_frames(source: Path) -> Iterator[tuple[Image.Image, int]]:
    """Each picture and its duration in milliseconds."""
    try:
        with Image.open(source, formats=["GIF"]) as film:
            for frame in ImageSequence.Iterator(film):
                check_size(frame, copies=2)
                yield opaque(frame), frame.info.get("duration", 0)
    except Exception as error:  # Pillow raises any exception for a damaged file
        raise ValueError(f"{source}: not a readable GIF ({reason_of(error)}); {_REMEDY}") from None


class VideoFile(PngFolder):
    """A GIF or an MP4 file. Frames are kept as PNG files in a folder beside it, ``FILE.mp4.partial``, until they are complete.

    Args:
        path: the file, with a suffix of :data:`VIDEO_SUFFIXES`.
        batches: frames, whose numbers are the seeds.
        rate: frames per second; at most 50 for a GIF.

    Raises:
        ValueError: an MP4 cannot be written here, or the frame rate does not fit a GIF.
    """

    def __init__(self, path: Path, batches: Batches, rate: float) -> None:
        super().__init__(path, batches)
        self.folder = path.with_name(f"{path.name}.partial")
        self.rate = rate
        if path.suffix.lower() != ".gif":
            _ffmpeg()
        elif rate > GIF_RATE:
            raise ValueError(
                f"a GIF shows at most {GIF_RATE} frames a second, and this film would have {rate:g}; write an .mp4, or with "
                f"--fps {GIF_RATE} or fewer"
            )
        elif 100 / rate > _LONGEST_GIF_FRAME:
            raise ValueError(f"a GIF shows a frame for {_LONGEST_GIF_FRAME / 100:g} s at most; {rate:g} a second is too few")

    def check(self, there: dict[str, Any] | None, record: dict[str, Any]) -> None:
        if self.path.exists():
            raise ValueError(f"--out {self.path} exists; name another file")
        super().check(there, record)

    def finish(self) -> None:
        joined = self.folder / f"joined{self.path.suffix}"
        frames = (frame for k in range(len(self.batches)) for frame in self.read(k))
        if joined.suffix.lower() == ".gif":
            _write_gif(joined, frames, self.rate)
        else:
            _write_mp4(joined, frames, self.batches.image_shape, self.rate)
        os.replace(joined, self.path)
        shutil.rmtree(self.folder)


def _write_gif(path: Path, frames: Iterable[np.ndarray], rate: float) -> None:
    first, *rest = (Image.fromarray(frame.squeeze(-1) if frame.shape[-1] == 1 else frame) for frame in frames)
    # Each frame's end is rounded to a hundredth of a second, so that rounding does not change the film's length.
    ends = [round(100 * i / rate) for i in range(len(rest) + 2)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    first.save(path, save_all=True, append_images=rest, duration=durations, loop=0)


def _write_mp4(path: Path, frames: Iterable[np.ndarray], image_shape: Sequence[int], rate: float) -> None:
    height, width, channels = image_shape
    writer = _ffmpeg().write_frames(
        str(path),
        (width, height),
        pix_fmt_in="gray" if channels == 1 else "rgb24",
        fps=rate,
        quality=None,
        macro_block_size=2,  # the pixel format of most players needs even sizes; the default would resize to multiples of 16
        ffmpeg_log_level="error",
        output_params=["-crf", "4"],
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _decoded(source: Path) -> tuple[Generator[bytes, None, None], dict[str, Any]]:
    """The frames of a video file as RGB bytes, and their metadata."""
    decoded = _ffmpeg().read_frames(str(source), pix_fmt="rgb24")
    try:
        return decoded, next(decoded)
    except (OSError, RuntimeError):  # ffmpeg's own message fills a screen
        raise ValueError(f"{source}: not a readable video; {_REMEDY}") from None


def _ffmpeg() -> ModuleType:
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ModuleNotFoundError("video files need imageio-ffmpeg: pip install 'ddim_fast[video]'") from None
    return imageio_ffmpeg


def _by_numbers(file: Path) -> list[tuple[int, str]]:
    """A key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", str(file))
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]
