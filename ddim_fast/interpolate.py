"""Interpolation between images or sounds: ``python -m ddim_fast.interpolate A.png B.png``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cli.comparison import new_folder, require_finite
from .cli.modality import Pictures, medium_of
from .cli.options import (
    CONVERT_HELP,
    EXACT_HELP,
    SamplerSettings,
    add_resize_option,
    add_sampler_options,
    class_or_none,
    settle_sampler,
)
from .cli.parser import CommandParser, parse_positive, run_command
from .cli.progress import announce, count_of, job_progress, say, say_resized
from .cli.samplers import batch_size_of, job_record, make_sampler
from .io.files import numbers, write_json
from .io.pictures import image_grid, save_gif, save_image, to_uint8
from .io.progress import Bar
from .io.records import FILM, GRID, RECORD
from .jobs.outputs import PngFolder
from .jobs.places import place_output
from .jobs.video_files import GIF_RATE, VIDEO_SUFFIXES, VideoFile, frame_rate

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.modality import Medium
    from .cli.samplers import AnySampler

_EXAMPLES = """\
  python -m ddim_fast.interpolate seed:3 seed:13 --class cat
  python -m ddim_fast.interpolate a.png b.png --frames 16 --exact --out between
  python -m ddim_fast.interpolate a.wav b.wav --model runs/digits --class 7/jackson --exact --out between
  python -m ddim_fast.interpolate seed:1 seed:2 seed:3 seed:4 --frames 8 --class dog --out corners
  python -m ddim_fast.interpolate --video clip.mp4 --factor 4 --out slow.mp4
"""

_USUAL = "interpolation"

# Frame rate of a film whose file gives none.
_RATE = 12

_ENDS_HELP = "two ends, or the four corners of a square: each an image or sound file to encode, or seed:N"
_FRAMES_HELP = "images or sounds from end to end, both included; with four corners, along each side (default: 9)"
_VIDEO_HELP = (
    "instead of ends, a film: a folder of frames, a GIF or a video file; new frames go between every two of it. Each given "
    "frame is encoded and each new frame sampled, with --steps network evaluations each. The model does not know motion: new "
    "frames lack a cross-fade's ghosts, but in a test a cross-fade was nearer to the true frames (17.0 dB against 15.2, or "
    "16.1 with --class)"
)
_FACTOR_HELP = "with --video: multiply the number of frames by this (default: 2)"
_FPS_HELP = f"frame rate of an MP4, or of a GIF up to 50 (default: the film keeps its length; a folder counts as {_RATE})"
_OUT_HELP = (
    "a new or empty folder; with --video, a folder, or a .gif or .mp4 file. The same command continues an unfinished film"
)


def _parser() -> CommandParser:
    p = CommandParser("interpolate", "Interpolate between images or sounds in noise space.", _EXAMPLES)
    p.add_argument("ends", nargs="*", metavar="END", help=_ENDS_HELP)
    p.add_argument("--frames", metavar="N", type=parse_positive, help=_FRAMES_HELP)
    p.add_argument("--video", metavar="FILM", type=Path, help=_VIDEO_HELP)
    p.add_argument("--factor", metavar="N", type=parse_positive, help=_FACTOR_HELP)
    p.add_argument("--fps", metavar="X", type=float, help=_FPS_HELP)
    p.add_argument("--exact", action="store_true", help=EXACT_HELP)
    add_resize_option(p)
    add_sampler_options(p, _USUAL, _OUT_HELP)
    p.add_argument(
        "--class", dest="label", metavar="CLASS", help="class of all images or sounds, a name or number (default: none)"
    )
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    return p


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    if settings.video is not None:
        _interpolate_video(parser, settings, settings.video)
        return
    sampler = make_sampler(parser, settings)
    import torch  # loading the model has counted these

    medium = medium_of(sampler, settings.convert, settings.resize)
    with parser.usage_errors():
        label = class_or_none(settings.label, sampler.config)
    with new_folder(parser, settings.out, _USUAL) as (folder, place):
        with parser.usage_errors():
            ends = [_end(end, sampler, medium, settings, label) for end in settings.ends]
        if isinstance(medium, Pictures):
            say_resized(medium.resizer, settings.quiet)
        count = settings.frames if len(ends) == 2 else settings.frames**2
        announce(settings, sampler, count_of(count, medium.noun), settings.quiet)
        # Files are encoded first, at the cost of one sampled image each.
        with Bar(count + sum(image is not None for image, _ in ends), medium.noun, shown=not settings.quiet):
            noise = torch.stack([_noise(image, seed, sampler, settings, label) for image, seed in ends])
            images = _between(noise, sampler, settings, label)
        _write(folder, images, medium, settings, label, sampler)
    if not settings.quiet:
        shown = [place, place / GRID, *([place / FILM] if len(settings.ends) == 2 else [])]
        print(f"{count_of(count, medium.noun)}, {' to '.join(settings.ends)}; see {', '.join(map(str, shown))}")


@dataclass(frozen=True, kw_only=True)
class InterpolateSettings(SamplerSettings):
    """The command's settings, from its options."""

    ends: list[str]
    frames: int
    video: Path | None
    factor: int
    fps: float | None
    exact: bool
    label: str | None
    convert: bool
    resize: str


def _settings(parser: CommandParser) -> InterpolateSettings:
    """The settings; options that contradict each other are a usage error."""
    options = vars(parser.parse_args())
    ends, video, frames, factor, fps = (options[name] for name in ("ends", "video", "frames", "factor", "fps"))
    options["frames"] = 9 if frames is None else frames
    options["factor"] = 2 if factor is None else factor
    with parser.usage_errors():
        if video is None:
            for name, given in (("factor", factor), ("fps", fps)):
                if given is not None:
                    raise ValueError(f"--{name} is an option of --video")
            if len(ends) not in (2, 4):
                raise ValueError(f"give two ends, or four corners; got {len(ends)}")
            if options["frames"] < 2:
                raise ValueError(f"--frames must be at least 2, for both ends; got {frames}")
        else:
            if ends or frames is not None:
                raise ValueError("--video takes the place of the ends and of --frames")
            if options["factor"] < 2:
                raise ValueError(f"--factor must be at least 2, for a new frame between each two; got {factor}")
            if fps is not None and not 0 < fps < float("inf"):
                raise ValueError(f"--fps must be a positive number; got {fps}")
            out = options["out"] or Path(_USUAL)
            if out.suffix and out.suffix.lower() not in VIDEO_SUFFIXES:
                raise ValueError(f"--out: a film is a folder, or a file {' or '.join(VIDEO_SUFFIXES)}; got {str(out)!r}")
    return InterpolateSettings(**settle_sampler(parser, options))


def _interpolate_video(parser: CommandParser, settings: InterpolateSettings, video: Path) -> None:
    """Make the missing frames."""
    from .jobs.video import VideoJob, scan_frames

    with parser.usage_errors():
        count, checksum, frame_size = scan_frames(video)
    sampler = make_sampler(parser, settings)
    with parser.usage_errors():
        medium = medium_of(sampler, resize=settings.resize)
        if not isinstance(medium, Pictures):
            raise ValueError(f"--video: {settings.model} is a model of {medium.noun}")
        label = class_or_none(settings.label, sampler.config)
        sampler.check(seeds=[0], labels=label, guidance=settings.guidance)
    medium.resizer.note(str(video), frame_size)
    size, resize = batch_size_of(settings, sampler), settings.resize
    job = VideoJob(sampler, video, count, settings.factor, size, settings.exact, label, settings.guidance, resize)
    own = {
        "video": f"sha256:{checksum}",
        "factor": settings.factor,
        "exact": settings.exact,
        "class": label,
        "resize": settings.resize,
    }
    record = job_record("interpolate", own, settings, sampler)

    def output_of(path: Path) -> PngFolder:
        if path.suffix:
            return VideoFile(path, job.batches, settings.fps or _rate(settings, path, video))
        if settings.fps is not None:
            raise ValueError("--fps is for a GIF or MP4; a folder of frames has no rate")
        return PngFolder(path, job.batches)

    with parser.usage_errors():
        output, there = place_output(settings.out, _USUAL, output_of, record)
    say_resized(medium.resizer, settings.quiet)
    missing = output.prepare(there, record)
    frames = len(job.batches.seeds)
    made_of = f"{count_of(frames, 'frames')}, {frames - count} of them new"
    if missing is not None:
        announce(settings, sampler, made_of, settings.quiet)
        with job_progress(output, missing, settings.quiet, noun="frames") as made:
            job.run(missing, output, made)
            output.finish()
    if not settings.quiet:
        print(f"{made_of}; see {output.path}")


def _rate(settings: InterpolateSettings, out: Path, video: Path) -> float:
    """The frame rate that keeps a film's length, at most its file format's largest."""
    rate = settings.factor * (frame_rate(video) or _RATE)
    if out.suffix.lower() != ".gif" or rate <= GIF_RATE:
        return rate
    say(f"a GIF shows at most {GIF_RATE} frames a second: it will last {rate / GIF_RATE:.3g} times as long", settings.quiet)
    return GIF_RATE


def _between(noise: Tensor, sampler: AnySampler, settings: InterpolateSettings, label: int | None) -> Tensor:
    """The images from one end to the other, or the square between four corners."""
    import torch

    from .diffusion.interpolation import slerp, slerp_grid

    frames = settings.frames
    x_T = slerp(noise[0], noise[1], torch.linspace(0, 1, frames)) if len(noise) == 2 else slerp_grid(noise, frames, frames)
    images = sampler.sample(x_T=x_T, labels=label, guidance=settings.guidance, batch_size=batch_size_of(settings, sampler))
    return require_finite(images.cpu(), "images")


def _end(
    end: str, sampler: AnySampler, medium: Medium, settings: InterpolateSettings, label: int | None
) -> tuple[Tensor | None, int | None]:
    """The image of an end, (1, C, H, W) on the host, or its seed."""
    if end.startswith("seed:"):
        if not end[5:].isdecimal():
            raise ValueError(f"{end!r} is no seed: write it as seed:7")
        seed = int(end[5:])
        sampler.check(seeds=[seed], labels=label, guidance=settings.guidance)
        return None, seed
    found = medium.load(end)
    if len(found) != 1:
        raise ValueError(f"an end is one file or a seed; {end!r} holds {len(found)}")
    return found, None


def _noise(
    image: Tensor | None, seed: int | None, sampler: AnySampler, settings: InterpolateSettings, label: int | None
) -> Tensor:
    """The noise of an end, (C, H, W) on the host."""
    if image is None:
        assert seed is not None
        return sampler.noise([seed])[0].cpu()
    return sampler.encode(image, labels=label, guidance=settings.guidance, exact=settings.exact)[0].cpu()


def _write(
    folder: Path, images: Tensor, medium: Medium, settings: InterpolateSettings, label: int | None, sampler: AnySampler
) -> None:
    """Write a numbered file each, a picture of all, and for two ends a film that runs there and back."""
    medium.write(folder, numbers(len(images)), images)
    shown = medium.shown(images)
    scale = max(1, 64 // shown.shape[-1])
    save_image(folder / GRID, image_grid(shown, columns=settings.frames), scale)
    if len(settings.ends) == 2:
        pictures = to_uint8(shown)
        save_gif(folder / FILM, [*pictures, *pictures[-2::-1]], scale, hold=800)
    own = {
        "ENDS": settings.ends,
        "frames": settings.frames,
        "exact": settings.exact,
        "class": label,
        "resize": settings.resize,
    }
    write_json(folder / RECORD, {**job_record("interpolate", own, settings, sampler), "finished": True})


if __name__ == "__main__":
    run_command(main)
