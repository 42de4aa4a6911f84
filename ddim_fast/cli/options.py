"""Options that several commands have."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.guidance import guided_steps
from ..diffusion.timesteps import ADAPTIVE, SPACINGS
from ..models.checkpoint import DEFAULT_MODEL
from ..models.config import UNetConfig
from .parser import CommandParser, list_integers, parse_integers, parse_positive, parse_spacing

__all__ = [
    "CLIP_HELP",
    "CONVERT_HELP",
    "DTYPES",
    "ENGINES",
    "EXACT_HELP",
    "GUIDE_HELP",
    "IMAGES_HELP",
    "IMAGE_CLASS_HELP",
    "INTERVAL_HELP",
    "MODEL_HELP",
    "SOUNDS_HELP",
    "SOUND_CLASS_HELP",
    "SPACING_HELP",
    "STEPS_HELP",
    "SamplerSettings",
    "add_sampler_options",
    "check_guidance_options",
    "check_some_guided",
    "class_or_none",
    "class_record",
    "image_labels",
    "one_class",
    "seed_labels",
    "settle_sampler",
    "settle_steps",
]


DTYPES = ("float32", "bfloat16", "float16", "int8")
# Those of ddim_fast.engine, which imports torch.
ENGINES = ("auto", "eager", "compiled", "captured")
CLIP_HELP = "clip the predicted image to [-R, R] at each step (default: never)"
CONVERT_HELP = "of sounds: mix channels down to one and resample to the model's rate, instead of refusing such recordings"
EXACT_HELP = "encode by exact inversion, which takes five to ten times as long"
SOUNDS_HELP = "sound files, folders of them, or Parquet files"
SOUND_CLASS_HELP = (
    "the class of all recordings, a name or number, or 'none' (default: that of each, where its folder or data set names one)"
)
IMAGES_HELP = "image files, or a data set: a folder, a Parquet file or an IDX file; brought to the model's size"
IMAGE_CLASS_HELP = (
    "for a class-conditional model: the class of all images, a name or number, or 'none' (default: that of each image, where "
    "the data has them: in folders called by their names or numbers, or as many as there are classes)"
)
GUIDE_HELP = (
    "a worse model of the same images, smaller or trained for less long: --guidance leads away from it instead of from no "
    "class, in a class or none (autoguidance)"
)
INTERVAL_HELP = "guide only in steps of the timesteps LO to HI, both included; the others are twice as fast (default: all)"
SPACING_HELP = (
    f"how the timesteps are chosen: {', '.join((*SPACINGS, ADAPTIVE))}, or the timesteps themselves, as 999,500,0 "
    "(default: quadratic)"
)
STEPS_HELP = "number of steps (default: 20, or as many as are listed)"
MODEL_HELP = "a packaged model, a checkpoint folder (also one of diffusers), or a .ckpt file of the DDIM authors' code"


def settle_steps(parser: CommandParser, steps: int | None, spacing: str | None) -> tuple[int, str]:
    """--steps and --spacing, and what they are where they are not given; a usage error where they contradict each other."""
    listed = None if spacing is None else parse_spacing(spacing)
    if isinstance(listed, list):
        if steps not in (None, len(listed)):
            parser.error(f"--steps {steps} does not fit the {len(listed)} timesteps of --spacing; leave it out")
        steps = len(listed)
    return 20 if steps is None else steps, spacing or "quadratic"


def check_guidance_options(parser: CommandParser, options: Mapping[str, Any]) -> None:
    """A usage error for --guide or --guidance-interval without --guidance."""
    if options["guidance_interval"] is not None and options["guidance"] is None:
        parser.error("--guidance-interval limits --guidance; give its scale, such as --guidance 2, as well")
    if options["guide"] is not None and options["guidance"] is None:
        parser.error("--guide is what --guidance leads away from; give its scale, such as --guidance 2, as well")


def check_some_guided(timesteps: np.ndarray, guidance: float | None, interval: Sequence[int]) -> None:
    """A ValueError where --guidance-interval leaves no step to guide."""
    low, high = interval
    if not guided_steps(timesteps, guidance, (low, high)).any() and guidance != 1:
        raise ValueError(
            f"--guidance-interval {low} {high}: no step is there, so nothing would be guided; they are at "
            + ", ".join(map(str, timesteps))
        )


def _class_list(classes: str, config: UNetConfig) -> list[int] | str:
    """The classes that ``--class`` lists, by number; or ``all`` or ``none``. Errors as of :func:`seed_labels`."""
    if classes == "none" or (classes == "all" and config.num_classes is None):
        return "none"
    if classes == "all":
        return "all"
    numbers: list[int] = []
    try:
        for part in map(str.strip, classes.split(",")):
            is_range = re.fullmatch(r"\d+-\d+", part) and part not in (config.class_names or ())
            numbers += parse_integers(part) if is_range else config.class_numbers(part)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"--class: {error}") from None
    return numbers


def class_record(classes: str, config: UNetConfig) -> str:
    """What ``--class`` lists, for a record: by number, however the user has written it."""
    chosen = _class_list(classes, config)
    return chosen if isinstance(chosen, str) else list_integers(chosen)


def seed_labels(classes: str, seeds: Sequence[int], config: UNetConfig) -> list[int] | None:
    """One label a seed. ``all`` gives seed s class s mod num_classes; a list is used in turn, of names, numbers and ranges of
    numbers, such as "horse,7,0-3".

    Raises:
        ValueError: a class is not the model's, or the model is unconditional.
    """
    chosen = _class_list(classes, config)
    if isinstance(chosen, str):
        return None if config.num_classes is None or chosen == "none" else [seed % config.num_classes for seed in seeds]
    return [chosen[i % len(chosen)] for i in range(len(seeds))]


def class_or_none(chosen: str | None, config: UNetConfig, option: str = "--class") -> int | None:
    """:func:`one_class`; None for ``none``, or where nothing was chosen."""
    return None if chosen is None or chosen == "none" else one_class(chosen, config, option)


def one_class(chosen: str, config: UNetConfig, option: str) -> int:
    """The number of the class that an option chooses.

    Raises:
        ValueError: it is not the model's, or a name of several; the message names the option.
    """
    try:
        return config.class_number(chosen)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def image_labels(
    chosen: str | None, own: Sequence[int | None], config: UNetConfig, option: str = "--class"
) -> list[int] | None:
    """One label an image: the chosen class, or its own, where all images and the model have classes; None for no class.

    Args:
        chosen: what the option says, or None where nothing was chosen.
        own: of each image, its label or None.
        config: of the model.
        option: its name.

    Raises:
        ValueError: as of :func:`one_class`.
    """
    if chosen is not None:
        label = class_or_none(chosen, config, option)
        return None if label is None else [label] * len(own)
    known = [label for label in own if label is not None]
    return None if config.num_classes is None or len(known) < len(own) else known


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """The settings that commands which encode and decode share: :func:`add_sampler_options`, and where the results go."""

    model: str
    steps: int
    spacing: str
    guidance: float | None
    batch_size: int
    device: str
    dtype: str
    out: Path
    quiet: bool

    def record(self) -> dict[str, Any]:
        """The settings that made the images, for the record beside them: the command's own, then the sampler's."""
        shared = [field.name for field in dataclasses.fields(SamplerSettings)]
        own = [name for name in vars(self) if name not in shared]
        return {name: getattr(self, name) for name in (*own, *shared) if name not in ("out", "quiet")}


def settle_sampler(parser: CommandParser, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a command with those of :func:`add_sampler_options`, where nothing is open any more."""
    steps, spacing = settle_steps(parser, options["steps"], options["spacing"])
    dtype = "float32" if options["dtype"] == "auto" else options["dtype"]
    return {**options, "steps": steps, "spacing": spacing, "dtype": dtype}


def add_sampler_options(parser: CommandParser) -> None:
    """The options of a command that encodes and decodes, for :func:`settle_sampler`."""
    parser.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    parser.add_argument("--spacing", metavar="NAME|LIST", help=SPACING_HELP)
    parser.add_argument("--guidance", metavar="W", type=float, help="classifier-free guidance scale (default: none)")
    parser.add_argument("--batch-size", metavar="N", type=parse_positive, default=64, help="images a network call")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPES], default="auto", help="what the network computes in; auto is float32"
    )
