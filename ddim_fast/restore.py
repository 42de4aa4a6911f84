"""Restore images by a model that was not trained for it: ``python -m ddim_fast.restore --task TASK IMAGES``."""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .cli.options import IMAGE_CLASS_HELP, SamplerSettings, add_resize_option, add_sampler_options, image_labels, settle_sampler
from .cli.parser import CommandParser, list_integers, parse_integers, parse_positive, run_command
from .cli.progress import announce, count_of, job_progress, say_resized
from .cli.samplers import batch_size_of, job_record, make_sampler, require_pictures
from .data.images import read_images, to_unit_range
from .data.resizing import Resizer, fit_image
from .evaluation.fidelity import check_similarity
from .io.files import item_names
from .io.pictures import save_image
from .io.records import COMPARISON
from .io.stopping import signals
from .jobs.outputs import Batches, PngFolder
from .jobs.places import place_output

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.samplers import AnySampler
    from .diffusion.degradations import LinearOperator
    from .jobs.restoration import RestorationJob
    from .models.config import UNetConfig

_EXAMPLES = """\
  python -m ddim_fast.restore --task inpaint photos/ --mask mask.png
  python -m ddim_fast.restore --task super-resolution thumbnails/ --factor 4 --travel 1 5
  python -m ddim_fast.restore --task deblur blurred.png --sigma 1.5 --seeds 0-7
  python -m ddim_fast.restore --task inpaint photos/ --rectangle 8,8,16,16 --degrade --out figures
"""

# Standard deviation of 8-bit rounding in an image in [-1, 1]: uniform over a step of 2/255.
_ROUNDING = 2 / 255 / 12**0.5

# Time travel that helps in every task except noisy deblurring: benchmarks/results/restoration-psnr.md.
_TRAVEL = (1, 3)

# The degradations, and the options that describe each.
_TASKS = {
    "inpaint": ("mask", "rectangle"),
    "super-resolution": ("factor",),
    "colorize": (),
    "deblur": ("sigma",),
    "compressed-sensing": ("ratio",),
}

_IMAGES_HELP = (
    "image files, or data sets: folders, Parquet or IDX files; of any size, see --resize. Restored images have the model's size"
)
_MASK_HELP = "inpaint: a picture of the images' size or the model's, white where to fill in, black or transparent elsewhere"
_RECTANGLE_HELP = "inpaint: left, top, width and height of the part to fill in, in pixels of the model's size; may be repeated"
_FACTOR_HELP = (
    "super-resolution: enlarge the images this many times; the inputs are resized to the model's size divided by it (default: "
    "2)"
)
_SIGMA_HELP = "deblur: standard deviation of the Gaussian blur, in pixels of the model's size"
_RATIO_HELP = "compressed-sensing: share of coefficients measured (default: 0.25)"
_DEGRADE_HELP = (
    "degrade clean images first, and report PSNR and SSIM of the restored ones (needs scikit-image; required for "
    "compressed-sensing)"
)
_NOISE_HELP = (
    "standard deviation of the noise in the degraded images, in units of [-1, 1]; --degrade adds it (default: 0; to deblur "
    "files, 0.0023, the error of 8-bit rounding)"
)
_TRAVEL_HELP = (
    "time travel: take every LENGTH steps REPEATS times, which restores better and takes REPEATS times as long; 1 1 is off "
    f"(default: {_TRAVEL[0]} {_TRAVEL[1]}, but 1 1 to deblur with --noise-std)"
)
_SEEDS_HELP = "restore each image once per seed; each seed gives another image that fits the same input"
_OUT_HELP = "a folder for one PNG per image, of the model's size; the same command continues an unfinished one"


def _parser() -> CommandParser:
    p = CommandParser("restore", "Restore images: inpaint, enlarge, deblur or colorize them.", _EXAMPLES)
    p.add_argument("images", nargs="+", metavar="IMAGES", help=_IMAGES_HELP)
    p.add_argument("--task", choices=_TASKS, required=True, help="what is restored")
    p.add_argument("--mask", metavar="FILE", type=Path, help=_MASK_HELP)
    p.add_argument("--rectangle", metavar="X,Y,W,H", type=_rectangle, action="append", help=_RECTANGLE_HELP)
    p.add_argument("--factor", metavar="N", type=parse_positive, help=_FACTOR_HELP)
    p.add_argument(
        "--sigma",
        metavar="X",
        type=float,
        help=_SIGMA_HELP,
    )
    p.add_argument("--ratio", metavar="X", type=float, help=_RATIO_HELP)
    p.add_argument("--degrade", action="store_true", help=_DEGRADE_HELP)
    p.add_argument("--num-images", metavar="N", type=parse_positive, help="the first N images only")
    p.add_argument("--noise-std", metavar="X", type=float, help=_NOISE_HELP)
    p.add_argument("--eta", metavar="X", type=float, default=1.0, help="noise of each step, 0 to 1")
    p.add_argument("--travel", metavar=("LENGTH", "REPEATS"), nargs=2, type=parse_positive, help=_TRAVEL_HELP)
    p.add_argument("--seeds", metavar="LIST", type=parse_integers, default="0", help=_SEEDS_HELP)
    add_resize_option(p)
    add_sampler_options(p, "restored", _OUT_HELP)
    p.add_argument("--class", dest="label", metavar="CLASS", help=IMAGE_CLASS_HELP)
    return p


def main() -> None:
    """Check the settings, then restore the missing images."""
    parser = _parser()
    settings = _settings(parser)
    sampler = make_sampler(parser, settings)
    require_pictures(parser, settings.model, sampler, "see python -m ddim_fast.restore_sounds")
    with parser.usage_errors():
        job, own, resizer = _job(settings, sampler)
        record = job_record("restore", own, settings, sampler)
        output, there = place_output(settings.out, "restored", lambda path: PngFolder(path, job.batches, job.names), record)
    say_resized(resizer, settings.quiet)
    missing = output.prepare(there, {**record, "images": {}})
    if missing is not None:
        _run(job, output, missing, settings)
    elif not settings.quiet:
        print(f"{output.path} is finished: it holds these {count_of(len(job.names), 'images')}, made with these settings")


@dataclass(frozen=True, kw_only=True)
class RestoreSettings(SamplerSettings):
    """The command's settings, from its options."""

    images: list[str]
    task: str
    mask: Path | None
    rectangle: list[tuple[int, int, int, int]] | None
    factor: int
    sigma: float | None
    ratio: float
    degrade: bool
    num_images: int | None
    noise_std: float
    eta: float
    travel: Sequence[int]
    seeds: list[int]
    label: str | None
    resize: str


def _settings(parser: CommandParser) -> RestoreSettings:
    """The settings; options that contradict each other are a usage error."""
    options = vars(parser.parse_args())
    task = options["task"]
    with parser.usage_errors():
        for other, names in _TASKS.items():
            for name in names:
                if other != task and options[name] is not None:
                    raise ValueError(f"--{name} is an option of --task {other}, not of {task}")
        if task == "inpaint" and (options["mask"] is None) == (options["rectangle"] is None):
            raise ValueError("--task inpaint needs --mask or --rectangle, the part to fill in")
        if task == "deblur" and options["sigma"] is None:
            raise ValueError("--task deblur needs --sigma, the standard deviation of the blur in pixels")
        if task == "compressed-sensing" and not options["degrade"]:
            raise ValueError("--task compressed-sensing needs --degrade: there are no files of such measurements")
        if not 0 <= options["eta"] <= 1:
            raise ValueError(f"--eta must lie in [0, 1]; got {options['eta']:g}")
    if options["travel"] is None:
        options["travel"] = (1, 1) if task == "deblur" and options["noise_std"] else _TRAVEL
    rounded = task == "deblur" and not options["degrade"]
    for name, default in (("noise_std", _ROUNDING if rounded else 0.0), ("factor", 2), ("ratio", 0.25)):
        options[name] = default if options[name] is None else options[name]
    return RestoreSettings(**settle_sampler(parser, options))


def _job(settings: RestoreSettings, sampler: AnySampler) -> tuple[RestorationJob, dict[str, Any], Resizer]:
    """The job of the settings, the settings that decide its result, and the resizer of the images.

    Raises:
        ValueError: an option or an image does not fit.
    """
    import torch

    from .diffusion.degradations import Mask
    from .diffusion.restoration import TimeTravel, measure
    from .jobs.restoration import RestorationJob

    shape, seeds = sampler.image_shape, settings.seeds
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds names one twice: {list_integers(seeds)}")
    mask = None if settings.mask is None else _mask(settings.mask)
    operator = _operator(settings, shape, mask)
    steps = {"eta": settings.eta, "noise_std": settings.noise_std, "travel": TimeTravel(*settings.travel)}
    sampler.restoration_steps(operator, **steps)
    if settings.degrade:
        check_similarity(shape[1:])
    channels, size, _ = shape if settings.degrade else operator(torch.zeros(1, *shape)).shape[1:]
    resizer = Resizer(size, settings.resize)
    if mask is not None:
        resizer.note(str(settings.mask), mask.size)
    names, pictures, own = _read(settings, resizer, channels, mask, sampler.config)
    measurement = to_unit_range(pictures).contiguous()
    if settings.degrade:
        measurement = measure(operator, measurement, settings.noise_std, range(len(names)))
    elif settings.task == "inpaint":
        measurement = operator(measurement)  # the files' own pixels in the part to fill in do not count
    image = [i for i in range(len(names)) for _ in seeds]
    labels = image_labels(settings.label, own, sampler.config)
    batches = Batches(
        seeds * len(names),
        None if labels is None else [labels[i] for i in image],
        min(batch_size_of(settings, sampler), len(image)),
        (*shape[1:], shape[0]),
    )
    sampler.check(seeds=batches.seeds, labels=batches.labels, guidance=settings.guidance)
    job = RestorationJob(
        sampler,
        operator,
        steps,
        settings.guidance,
        measurement,
        np.moveaxis(pictures.numpy(), 1, -1) if settings.degrade else None,
        image,
        [names[i] if len(seeds) == 1 else f"{names[i]}-{seed}" for i, seed in zip(image, batches.seeds, strict=True)],
        batches,
    )
    return (
        job,
        {
            "IMAGES": f"sha256:{_checksum(pictures.numpy(), names)}",
            "task": settings.task,
            "degrade": settings.degrade,
            "mask": f"sha256:{_checksum(operator.known.cpu().numpy())}" if isinstance(operator, Mask) else None,
            **{name: getattr(settings, name) for name in ("factor", "sigma", "ratio") if name in _TASKS[settings.task]},
            "noise-std": settings.noise_std,
            "eta": settings.eta,
            "travel": list(settings.travel),
            "seeds": list_integers(seeds),
            "class": None if labels is None else ",".join(map(str, labels)),
        },
        resizer,
    )


def _operator(settings: RestoreSettings, image_shape: tuple[int, int, int], mask: Image.Image | None) -> LinearOperator:
    """The degradation of images of ``image_shape``."""
    from .diffusion.degradations import Blur, CompressedSensing, Downscale, Grey, Mask

    channels, height, width = image_shape
    if mask is not None:
        return Mask(_known(mask, settings, height))
    if settings.rectangle is not None:
        return Mask.outside((height, width), settings.rectangle)
    if settings.sigma is not None:
        return Blur((height, width), settings.sigma)
    if settings.task == "super-resolution":
        return Downscale(settings.factor)
    if settings.task == "colorize":
        return Grey(channels)
    return CompressedSensing((height, width), settings.ratio)


def _mask(path: Path) -> Image.Image:
    """The picture of a mask, black where it is transparent."""
    pictures = [picture for _, picture, _ in read_images(str(path), labelled=False, background="black")]
    if len(pictures) != 1:
        raise ValueError(f"--mask is one picture; {str(path)!r} holds {len(pictures)}")
    return pictures[0]


def _known(mask: Image.Image, settings: RestoreSettings, size: int) -> Tensor:
    """(size, size), False where a mask is white; in a resized mask, where any part of a pixel is white."""
    import torch

    white = Image.fromarray(np.where(np.asarray(mask.convert("L")) < 128, np.uint8(0), np.uint8(255)))
    # The mean over each pixel: known pixels must not mix with the part to fill in.
    known = torch.from_numpy(fit_image(white, 1, size, settings.resize, Image.Resampling.BOX)[0] == 0)
    if known.all():
        raise ValueError(f"--mask: {settings.mask} has no white pixel, so there is nothing to fill in")
    return known


def _read(
    settings: RestoreSettings, resizer: Resizer, channels: int, mask: Image.Image | None, config: UNetConfig
) -> tuple[list[str], Tensor, list[int | None]]:
    """The images' names, (N, C, H, W) uint8 pixels, and class labels or None."""
    import torch

    labelled = settings.label is None and config.num_classes is not None
    classes: dict[str, Any] = {"num_classes": config.num_classes, "class_names": config.class_names, "labelled": labelled}
    rows = itertools.chain.from_iterable(read_images(spec, **classes) for spec in settings.images)
    places, pictures, labels = [], [], []
    for place, image, label in itertools.islice(rows, settings.num_images):
        if mask is not None and mask.size not in (image.size, (resizer.size, resizer.size)):
            raise ValueError(
                f"{place} is {_size(image.size)} pixels and --mask {settings.mask} {_size(mask.size)}; a mask has the size of "
                f"the images or the model's, {resizer.size}x{resizer.size}"
            )
        places.append(place)
        pictures.append(resizer.fit(place, image, channels))
        labels.append(label)
    if not pictures:
        raise ValueError(f"no images in {', '.join(settings.images)}: files such as .png or .jpg are needed")
    return item_names(places), torch.from_numpy(np.stack(pictures)), labels


def _run(job: RestorationJob, output: PngFolder, missing: list[int], settings: RestoreSettings) -> None:
    """Restore the missing batches, write the files, and print a summary."""
    images = count_of(len(job.names), "images")
    evaluations = len(job.sampler.restoration_steps(job.operator, **job.steps)[0])
    way = f"{images} by {count_of(evaluations, 'network evaluations')} each"
    length, repeats = settings.travel
    if repeats > 1:
        way += f" (--travel {length} {repeats}; --travel 1 1 takes {len(job.sampler.timesteps)})"
    announce(settings, job.sampler, way, settings.quiet)
    with job_progress(output, missing, settings.quiet) as made:
        for k in signals.each(missing, "batch"):
            job.restore(k, output)
            made(k)
        save_image(output.path / COMPARISON, job.comparison(output), scale=max(1, 64 // job.batches.image_shape[0]))
        means = job.finish(output)
    if not settings.quiet:
        print(f"{images} restored by {count_of(evaluations, 'network evaluations')} each; see {output.path}")
        print("\n".join(f"{name.replace('_', ' ')}: {value:.4g}" for name, value in means.items()))


def _rectangle(text: str) -> tuple[int, int, int, int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no rectangle: write left, top, width and height, as 8,8,16,16")
    left, top, width, height = map(int, numbers)
    return left, top, width, height


def _checksum(array: np.ndarray, names: list[str] | None = None) -> str:
    """The checksum of an array and of the names of its images."""
    return hashlib.sha256(repr((array.shape, names)).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def _size(size: tuple[int, int]) -> str:
    """Width and height as WxH."""
    return "x".join(map(str, size))


if __name__ == "__main__":
    run_command(main)
