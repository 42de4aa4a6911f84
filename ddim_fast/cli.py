"""What the commands share: one-line errors, exit codes, argument types."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from .diffusion.step import SIGMA_HAT
from .diffusion.timesteps import ADAPTIVE
from .models.checkpoint import AUTOENCODER, DEFAULT_MODEL, local_model, resolve_model
from .models.checksum import weights_checksum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .diffusion.latent import LatentSampler
    from .diffusion.sampler import Sampler
    from .jobs.outputs import Output
    from .models.audio import AudioConfig
    from .models.unet import UNet

    AnySampler = Sampler | LatentSampler

__all__ = [
    "CONVERT_HELP",
    "DTYPES",
    "GUIDE_HELP",
    "IMAGES_HELP",
    "IMAGE_CLASS_HELP",
    "INTERVAL_HELP",
    "MODEL_HELP",
    "STEPS_HELP",
    "CommandParser",
    "add_sampler_options",
    "check_guidance_options",
    "image_labels",
    "job_progress",
    "list_integers",
    "load_labelled",
    "load_model",
    "load_sampler",
    "make_sampler",
    "parse_class",
    "parse_eta",
    "parse_integers",
    "parse_positive",
    "parse_spacing",
    "pixel_model",
    "require_pictures",
    "run_command",
    "sampler_settings",
    "seed_labels",
    "select_dtype",
    "settle_steps",
]


DTYPES = ("float32", "bfloat16", "float16", "int8")
CONVERT_HELP = "of sounds: mix channels down to one and resample to the model's rate, instead of refusing such recordings"
IMAGES_HELP = "image files, or a data set: a folder, a Parquet file or an IDX file; brought to the model's size"
IMAGE_CLASS_HELP = (
    "for a class-conditional model: the class of all images, or 'none' (default: that of each image, where the data has them: "
    "in folders called by their numbers, or as many as there are classes)"
)
GUIDE_HELP = (
    "a worse model of the same images, smaller or trained for less long: --guidance leads away from it instead of from no "
    "class, in a class or none (autoguidance)"
)
INTERVAL_HELP = "guide only in steps of the timesteps LO to HI, both included; the others are twice as fast (default: all)"
_SPACING_HELP = "how the timesteps are chosen, as of sample (default: quadratic)"
STEPS_HELP = "number of steps (default: 20, or as many as are listed)"
MODEL_HELP = "a packaged model, a checkpoint folder (also one of diffusers), or a .ckpt file of the DDIM authors' code"


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are one line on stderr and exit code 2.

    Attributes:
        hint: what a usage error says at its end.
    """

    hint = "--help shows the options"

    def __init__(self, command: str, description: str, examples: str) -> None:
        super().__init__(
            prog=f"python -m ddim_fast.{command}",
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} ({self.hint})\n")

    @contextlib.contextmanager
    def usage_errors(self) -> Iterator[None]:
        """Inside, a ValueError or a missing file is the fault of an option."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            self.error(str(error))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Defaults that mean "nothing" are not shown; the help text says so where it matters."""
        shows_nothing = action.default is None or action.default is False or action.default == []
        return action.help if shows_nothing else super()._get_help_string(action)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's ``main``: what goes wrong outside of its options is one line on stderr and exit code 1. Warnings of
    this package are a line each."""
    warnings.formatwarning = _format_warning
    try:
        main()
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if os.environ.get("DDIM_FAST_TRACEBACK"):
            raise
        text = f"{error.strerror}: {error.filename!r}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


_format_others = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], filename: str, *place: Any) -> str:
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if ours else _format_others(message, category, filename, *place)


@contextlib.contextmanager
def job_progress(output: Output, missing: Sequence[int], what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar of a job that fills ``output``, and a line on how to go on where it is interrupted.

    Args:
        missing: the batches to make.
        what: they hold, such as ``images``.

    Yields:
        A function to call with the number of each batch that is made.
    """
    total = len(output.batches.seeds)
    there = total - output.batches.count(missing)
    if there and not quiet:
        print(f"{output.folder} holds {there} of {total} {what}; going on")
    try:
        with tqdm(total=total, initial=there, unit=f" {what}", disable=quiet) as bar:
            yield lambda k: bar.update(output.batches.count([k]))
    except KeyboardInterrupt:
        there = total - output.batches.count(output.missing())
        print(f"stopped: {output.folder} holds {there} of {total} {what}; the same command goes on with it", file=sys.stderr)
        raise


def parse_integers(text: str) -> list[int]:
    """``"0-3,8"`` -> [0, 1, 2, 3, 8].

    Raises:
        argparse.ArgumentTypeError: the text is no such list.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers and ranges such as 0-63 or 1,5,7-9")
        if dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f"the range {part.strip()!r} runs backwards")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def settle_steps(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """Gives --steps and --spacing, where they are not given, what they are then; a usage error where they contradict each
    other."""
    listed = None if arguments.spacing is None else parse_spacing(arguments.spacing)
    if isinstance(listed, list):
        if arguments.steps not in (None, len(listed)):
            parser.error(f"--steps {arguments.steps} does not fit the {len(listed)} timesteps of --spacing; leave it out")
        arguments.steps = len(listed)
    arguments.steps = 20 if arguments.steps is None else arguments.steps
    arguments.spacing = arguments.spacing or "quadratic"


def list_integers(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 3, 8] -> "0-3,8", what :func:`parse_integers` takes."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def parse_spacing(text: str) -> str | list[int]:
    """The name of a spacing, or ``"999,500,0"`` -> [999, 500, 0]."""
    return [int(t) for t in text.split(",")] if all(t.strip().isdecimal() for t in text.split(",")) else text


def parse_eta(text: str) -> float | str:
    """A number, or ``sigma-hat``.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text == SIGMA_HAT:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number in [0, 1] nor {SIGMA_HAT!r}") from None


def seed_labels(
    classes: str, seeds: Sequence[int], num_classes: int | None, audio: AudioConfig | None = None
) -> list[int] | None:
    """One label a seed. ``all`` gives seed s class s mod num_classes; a list is used in turn, of numbers or, where the model is
    one of sounds, of names.

    Raises:
        ValueError: the classes are no list, or the model is unconditional.
    """
    if num_classes is None or classes == "none":
        if classes not in ("all", "none"):
            raise ValueError("--class: the model is unconditional")
        return None
    if classes == "all":
        return [seed % num_classes for seed in seeds]
    try:
        if audio is None:
            chosen = parse_integers(classes)
        else:
            chosen = [number for name in classes.split(",") for number in audio.class_numbers(name)]
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise ValueError(f"--class: {error}") from None
    return [chosen[i % len(chosen)] for i in range(len(seeds))]


def parse_class(text: str) -> str:
    """A class number, or ``none``.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a class number nor 'none'")
    return text


def image_labels(chosen: str | None, own: Sequence[int | None], num_classes: int | None) -> list[int] | None:
    """One label an image: the chosen class, or its own, where all images and the model have classes; None for no class.

    Args:
        chosen: what :func:`parse_class` returned, or None where nothing was chosen.
        own: of each image, its label or None.
        num_classes: of the model.
    """
    if chosen is not None and chosen != "none":
        return [int(chosen)] * len(own)  # one that the model has not is told by the sampler
    return None if chosen == "none" or num_classes is None or None in own else list(own)


def select_dtype(name: str, compiled: bool, device: torch.device) -> torch.dtype:
    """What ``--dtype`` means: ``auto`` is bfloat16 for a run that is compiled, where the device is fast at it."""
    import torch

    from .devices import bf16_is_fast

    if name == "auto":
        return torch.bfloat16 if compiled and bf16_is_fast(device) else torch.float32
    return getattr(torch, name)


def load_labelled(specs: Sequence[str], chosen: str | None, sampler: AnySampler) -> tuple[Tensor, list[int] | None]:
    """The images that a command is given, and their classes.

    Args:
        specs: data sets or image files, each as :func:`ddim_fast.training.data.load_images` takes one.
        chosen: as of :func:`image_labels`.
        sampler: says what size and which classes.

    Returns:
        (N, C, H, W) float32 in [-1, 1] of the sampler's images' size, and N labels or None.

    Raises:
        FileNotFoundError, ValueError: as :func:`ddim_fast.training.data.load_images`.
    """
    import torch

    from .training.data import load_images, to_unit_range

    num_classes = sampler.config.num_classes
    options = {"num_classes": num_classes, "labelled": chosen is None and num_classes is not None}
    data = [load_images(spec, *sampler.image_shape[:2], **options) for spec in specs]
    images = torch.cat([to_unit_range(part.images) for part in data]).contiguous()
    own = [label for part in data for label in ([None] * len(part) if part.labels is None else part.labels.tolist())]
    return images, image_labels(chosen, own, num_classes)


def add_sampler_options(parser: CommandParser) -> None:
    """The options of a command that encodes and decodes, which :func:`make_sampler` reads."""
    parser.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    parser.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    parser.add_argument("--spacing", metavar="NAME|LIST", help=_SPACING_HELP)
    parser.add_argument("--guidance", metavar="W", type=float, help="classifier-free guidance scale (default: none)")
    parser.add_argument("--batch-size", metavar="N", type=parse_positive, default=64, help="images a network call")
    parser.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the network computes in")


def make_sampler(parser: CommandParser, arguments: argparse.Namespace, engine: str = "auto") -> AnySampler:
    """The deterministic DDIM sampler that the options of :func:`add_sampler_options` describe."""
    from .devices import pick_device

    settle_steps(parser, arguments)
    with parser.usage_errors():
        device = pick_device(arguments.device)
    return load_sampler(
        parser,
        arguments.model,
        device,
        steps=arguments.steps,
        spacing=parse_spacing(arguments.spacing),
        dtype=select_dtype(arguments.dtype, compiled=False, device=device),
        engine=engine,
    )


def load_model(parser: CommandParser, name: str) -> tuple[UNet, Path]:
    """The network of a checkpoint, and its folder or file."""
    from .deploy.folder import is_export
    from .models.unet import UNet

    with parser.usage_errors():
        resolve_model(name)
    path = local_model(name)
    if is_export(path):
        parser.error(f"{name} is an export to ONNX, which python -m ddim_fast.sample --engine onnx takes")
    return UNet.from_pretrained(path), path


def check_guidance_options(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """A usage error for --guide or --guidance-interval without --guidance."""
    if arguments.guidance_interval is not None and arguments.guidance is None:
        parser.error("--guidance-interval limits --guidance; give its scale, such as --guidance 2, as well")
    if arguments.guide is not None and arguments.guidance is None:
        parser.error("--guide is what --guidance leads away from; give its scale, such as --guidance 2, as well")


def load_sampler(
    parser: CommandParser, name: str, device: torch.device, guide: str | None = None, **options: Any
) -> AnySampler:
    """The sampler of a checkpoint; in latent space, if an autoencoder lies beside it.

    Args:
        name: the model, as of ``--model``.
        guide: the same of its guide.
        options: of :class:`ddim_fast.Sampler`.
    """
    from .diffusion.latent import LatentSampler
    from .diffusion.sampler import Sampler
    from .interop.autoencoder import load_autoencoder

    model, folder = load_model(parser, name)
    if guide is not None:
        options["guide"] = load_model(parser, guide)[0].to(device)
    with parser.usage_errors():
        sampler = Sampler(model.to(device), **options)
    if not (folder / AUTOENCODER).is_dir():
        return sampler
    return LatentSampler(sampler, load_autoencoder(folder / AUTOENCODER))


def require_pictures(parser: CommandParser, name: str, sampler: AnySampler, instead: str) -> None:
    """A usage error where the images of model ``name`` are sounds.

    Args:
        instead: which command is for those.
    """
    if sampler.model.audio is not None:
        parser.error(f"--model {name} is a model of sounds, not of pictures: {instead}")


def pixel_model(parser: CommandParser, name: str, instead: str) -> Path:
    """The folder or file of a model of images themselves, for what is not done in latent space.

    Args:
        name: the model, as of ``--model``.
        instead: what to do with a model of latents.
    """
    with parser.usage_errors():
        resolve_model(name)
    path = local_model(name)
    if (path / AUTOENCODER).is_dir():
        parser.error(f"--model {name} is a model of an autoencoder's latents, not of images: {instead}")
    return path


def sampler_settings(arguments: argparse.Namespace, sampler: AnySampler) -> dict[str, str | int | float | None]:
    """What the options of :func:`add_sampler_options` say of the images that ``sampler`` makes, for the record of a job."""
    return {
        "model": f"sha256:{weights_checksum(*sampler.networks)}",
        "steps": arguments.steps,
        # A fit can be made anew: then these are other timesteps.
        "spacing": list_integers(sampler.timesteps[::-1].tolist()) if arguments.spacing == ADAPTIVE else arguments.spacing,
        "guidance": arguments.guidance,
        "batch-size": arguments.batch_size,
        "engine": sampler.engine,
        "dtype": arguments.dtype,
        "device": sampler.device.type,
    }
