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

from ..data.resizing import RESIZES
from ..diffusion.guidance import guided_steps
from ..diffusion.solvers import FITTED
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
    "GUIDANCE_HELP",
    "GUIDE_HELP",
    "IMAGES_HELP",
    "IMAGE_CLASS_HELP",
    "INTERVAL_HELP",
    "MODEL_HELP",
    "RESIZE_HELP",
    "SOUNDS_HELP",
    "SOUND_CLASS_HELP",
    "SOUND_MODEL",
    "SPACING_HELP",
    "STEPS_HELP",
    "SamplerSettings",
    "add_resize_option",
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


# Titles of --help, in this order.
SAMPLING, EXECUTION, OUTPUT = "sampling", "execution", "output"
DTYPES = ("float32", "bfloat16", "float16", "int8")
# The engines of ddim_fast.engine, which imports torch.
ENGINES = ("auto", "eager", "compiled", "captured")
CLIP_HELP = "clip the predicted image to [-R, R] at each step (default: never)"
CONVERT_HELP = "sounds: mix channels down to one and resample to the model's rate, instead of refusing such recordings"
EXACT_HELP = (
    "encode by exact inversion. It takes more than one network evaluation per step: 5 or 6 in 50 steps, 6 to 11 in 20, 8 to "
    "17 in 10, 20 to 42 in 5"
)
# The default --model of commands for sounds.
SOUND_MODEL = "spoken-digits"
SOUNDS_HELP = "sound files, folders of them, or Parquet files"
SOUND_CLASS_HELP = (
    "class of all recordings: a name or number, or 'none' (default: each recording's own, where its folder or data set names "
    "one)"
)
IMAGES_HELP = "image files, or a data set: a folder, a Parquet file or an IDX file; of any size, see --resize"
RESIZE_HELP = (
    "how to resize pictures of another size. crop, as for training data: the central square, resized, or a smaller picture in "
    "a black frame; pad: the whole picture, resized, in a black frame; stretch: the whole picture, out of proportion"
)
IMAGE_CLASS_HELP = (
    "for a class-conditional model, the class of all images: a name or number, or 'none' (default: each image's own, where "
    "the data has labels, or one folder per class or folders named by class names or numbers)"
)
GUIDE_HELP = (
    "a worse model of the same images, smaller or trained for less time: --guidance leads away from it instead of from no "
    "class, with or without --class (autoguidance)"
)
GUIDANCE_HELP = "classifier-free guidance scale (default: none)"
INTERVAL_HELP = "guide only the steps at timesteps LO to HI, both included; other steps are twice as fast (default: all)"
SPACING_HELP = (
    f"spacing of the timesteps: {', '.join((*SPACINGS, ADAPTIVE))}, or the timesteps themselves, as 999,500,0 "
    "(default: quadratic)"
)
COMPILE_HELP = (
    "the fastest execution and dtype of the device. GPU: all steps compiled into one CUDA graph. CPU: all steps as one "
    "plan of this package's C++ operators, or torch.compile where they were not built"
)
ENGINE_HELP = "engine to use, instead of --compile's choice"
ONNX_ENGINE_HELP = (
    f"{ENGINE_HELP}. onnx: by ONNX Runtime, without torch; MODEL is a folder of export --to onnx, whose settings become the "
    "defaults, or a model that is exported at its first use. plan: by the C++ operators, without torch; MODEL is a folder of "
    "export --to plan"
)
DTYPE_HELP = (
    "dtype of the network's computation. auto: with --compile bfloat16 where the device is fast at it, otherwise float32. "
    "int8: 8-bit convolutions, only on x86 processors with AVX-512 VNNI (servers from Cascade Lake and Zen 4 on) or AVX-VNNI "
    "(Alder Lake and later)"
)
STEPS_HELP = "number of steps (default: 20, or as many as are listed)"
MODEL_HELP = (
    "a packaged model (ddim_fast models lists them), a checkpoint folder (also one of diffusers), a .ckpt file of the DDIM "
    "authors' code, or owner/name on the Hugging Face Hub"
)


def settle_steps(parser: CommandParser, steps: int | None, spacing: str | None, solver: str | None = None) -> tuple[int, str]:
    """Settle --steps and --spacing with their defaults; contradictory ones are a usage error."""
    if solver == FITTED:
        if spacing not in (None, ADAPTIVE):
            parser.error(f"--solver fitted brings its timesteps; leave --spacing {spacing} out")
        spacing = ADAPTIVE
    listed = None if spacing is None else parse_spacing(spacing)
    if isinstance(listed, list):
        if steps not in (None, len(listed)):
            parser.error(f"--steps {steps} does not match the {len(listed)} timesteps of --spacing; leave it out")
        steps = len(listed)
    return 20 if steps is None else steps, "quadratic" if spacing is None else spacing


def check_guidance_options(parser: CommandParser, options: Mapping[str, Any]) -> None:
    """A usage error for --guide or --guidance-interval without --guidance."""
    if options["guidance_interval"] is not None and options["guidance"] is None:
        parser.error("--guidance-interval limits --guidance; give its scale, such as --guidance 2, as well")
    if options["guide"] is not None and options["guidance"] is None:
        parser.error("--guide is what --guidance leads away from; give its scale, such as --guidance 2, as well")


def check_some_guided(timesteps: np.ndarray, guidance: float | list[float] | None, interval: Sequence[int]) -> None:
    """A ValueError where --guidance-interval leaves no step to guide."""
    low, high = interval
    if not guided_steps(timesteps, guidance, (low, high)).any() and guidance != 1:
        raise ValueError(
            f"--guidance-interval {low} {high} holds no step, so nothing would be guided; the steps are at  "
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
            for name in map(str, parse_integers(part)) if is_range else [part]:
                numbers += config.class_numbers(name)
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"--class: {error}") from None
    return numbers


def class_record(classes: str, config: UNetConfig) -> str:
    """The value of ``--class`` for a record: class numbers, however the user has written them."""
    chosen = _class_list(classes, config)
    return chosen if isinstance(chosen, str) else list_integers(chosen)


def seed_labels(classes: str, seeds: Sequence[int], config: UNetConfig) -> list[int] | None:
    """One label per seed. ``all`` gives seed s class s mod num_classes. A list of names, numbers and ranges of numbers, such as
    "horse,7,0-3", is used in turn.

    Raises:
        ValueError: a class is not the model's, or the model is unconditional.
    """
    chosen = _class_list(classes, config)
    if isinstance(chosen, str):
        return None if config.num_classes is None or chosen == "none" else [seed % config.num_classes for seed in seeds]
    return [chosen[i % len(chosen)] for i in range(len(seeds))]


def class_or_none(chosen: str | None, config: UNetConfig, option: str = "--class") -> int | None:
    """:func:`one_class`; None for ``none`` or without the option."""
    return None if chosen is None or chosen == "none" else one_class(chosen, config, option)


def one_class(chosen: str, config: UNetConfig, option: str) -> int:
    """The number of the class that an option chooses.

    Raises:
        ValueError: the model has no such class, or several of that name; the message names the option.
    """
    try:
        return config.class_number(chosen)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def image_labels(
    chosen: str | None, own: Sequence[int | None], config: UNetConfig, option: str = "--class"
) -> list[int] | None:
    """One label per image: the chosen class, or the image's own where all images and the model have classes; None for no class.

    Args:
        chosen: the option's value, or None without it.
        own: the label of each image, or None.
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
    """The settings shared by commands that encode and decode: :func:`add_sampler_options`, and the place of the results."""

    model: str
    steps: int
    spacing: str
    guidance: float | None
    compile: bool
    engine: str
    batch_size: int | None
    device: str
    dtype: str
    out: Path | None
    quiet: bool

    def own(self) -> dict[str, Any]:
        """The command's own settings, by option."""
        shared = [field.name for field in dataclasses.fields(SamplerSettings)]
        return {name.replace("_", "-"): value for name, value in vars(self).items() if name not in shared}


def settle_sampler(parser: CommandParser, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a command with those of :func:`add_sampler_options`, settled except for those that depend on the
    device."""
    steps, spacing = settle_steps(parser, options["steps"], options["spacing"])
    return {**options, "steps": steps, "spacing": spacing}


def add_sampler_options(parser: CommandParser, usual: str, out_help: str, model: str = DEFAULT_MODEL) -> None:
    """Add the options of a command that encodes and decodes, for :func:`settle_sampler`.

    Args:
        usual: the default folder of the command.
        out_help: the help of --out.
        model: the command's default model.
    """
    parser.add_argument("--model", metavar="MODEL", default=model, help=MODEL_HELP)
    add_step_options(parser)
    sampling = parser.group(SAMPLING)
    sampling.add_argument("--guidance", metavar="W", type=float, help=GUIDANCE_HELP)
    add_execution_options(parser, ENGINES)
    add_output_options(parser, usual, out_help)


def add_resize_option(parser: CommandParser) -> None:
    """Add --resize, the way to resize pictures of another size."""
    parser.add_argument("--resize", choices=RESIZES, default="crop", help=RESIZE_HELP)


def add_step_options(parser: CommandParser) -> None:
    """Add the options for the number of steps and their spacing."""
    sampling = parser.group(SAMPLING)
    sampling.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    sampling.add_argument("--spacing", metavar="NAME|LIST", help=SPACING_HELP)


def add_execution_options(parser: CommandParser, engines: Sequence[str], batch_size: int | None = None) -> None:
    """Add the options for the device, engine and dtype.

    Args:
        engines: the choices of --engine.
        batch_size: the default one; None is :func:`usual_batch_size`.
    """
    execution = parser.group(EXECUTION)
    execution.add_argument("--compile", action="store_true", help=COMPILE_HELP)
    engine_help = ONNX_ENGINE_HELP if "onnx" in engines else ENGINE_HELP
    execution.add_argument("--engine", choices=engines, default="auto", help=engine_help)
    execution.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    execution.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=DTYPE_HELP)
    size_help = "images per network call" + ("" if batch_size else " (default: 12 on a CPU, 64 on a GPU)")
    execution.add_argument("--batch-size", metavar="N", type=parse_positive, default=batch_size, help=size_help)


def add_output_options(parser: CommandParser, usual: str, out_help: str, metavar: str = "DIR") -> None:
    """Add the options for the results and the progress."""
    output = parser.group(OUTPUT)
    following = f"(default: {usual}, or {usual}-2 ... if that is not empty)"
    output.add_argument("--out", metavar=metavar, type=Path, help=f"{out_help} {following}")
    output.add_argument("--quiet", action="store_true", help="no progress and no summary")


def usual_batch_size(where: str) -> int:
    """The default number of images per network call: small on a CPU, so that the first pictures appear soon.

    Args:
        where: a device type, or an execution provider of ONNX Runtime.
    """
    return 12 if where.lower().startswith("cpu") else 64
