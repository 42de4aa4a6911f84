"""The way from one image or sound to another: ``python -m ddim_fast.interpolate A.png B.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from .cli import CONVERT_HELP, CommandParser, add_sampler_options, make_sampler, parse_positive, run_command
from .diffusion.interpolation import slerp, slerp_grid
from .diffusion.sampler import Sampler
from .files import atomic_folder
from .media import image_grid, save_gif, save_image, to_uint8
from .medium import Medium, medium_of
from .models.checkpoint import write_json
from .ops.noise import INITIAL_NOISE, seeded_noise

_EXAMPLES = """\
  python -m ddim_fast.interpolate seed:3 seed:13 --class 3
  python -m ddim_fast.interpolate a.png b.png --frames 16 --exact --out between
  python -m ddim_fast.interpolate a.wav b.wav --model runs/digits --class 7/jackson --exact --out between
  python -m ddim_fast.interpolate seed:1 seed:2 seed:3 seed:4 --frames 8 --class 5 --out corners
"""

_ENDS_HELP = "two ends, or the four corners of a square: each an image or sound file, which is encoded, or seed:N"
_FRAMES_HELP = "images or sounds from end to end, both included; of four corners, along each side"
_EXACT_HELP = "encode images by exact inversion, so that the ends are the images themselves"


def _parser() -> CommandParser:
    p = CommandParser(
        "interpolate", "What lies between images, or between sounds, by way of the noise that they come from.", _EXAMPLES
    )
    p.add_argument("ends", nargs="+", metavar="END", help=_ENDS_HELP)
    p.add_argument("--frames", metavar="N", type=parse_positive, default=9, help=_FRAMES_HELP)
    p.add_argument("--exact", action="store_true", help=_EXACT_HELP)
    add_sampler_options(p)
    p.add_argument("--class", dest="label", metavar="N|NAME", help="class of all images or sounds (default: none)")
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("interpolation"), help="a new or empty folder")
    p.add_argument("--quiet", action="store_true", help="no summary")
    return p


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if len(arguments.ends) not in (2, 4):
        parser.error(f"give two ends, or four corners; got {len(arguments.ends)}")
    if arguments.frames < 2:
        parser.error(f"--frames must be at least 2, for both ends; got {arguments.frames}")
    sampler = make_sampler(parser, arguments)
    medium = medium_of(sampler.model, arguments.convert)
    with parser.usage_errors():
        if arguments.label is not None:
            arguments.label = medium.label(arguments.label)
        noise = torch.stack([_noise(end, sampler, medium, arguments) for end in arguments.ends])
    try:
        with atomic_folder(arguments.out) as out:
            images = _between(noise, sampler, arguments)
            _write(out, images, medium, arguments)
    except FileExistsError as error:
        parser.error(f"--out: {error}")
    if not arguments.quiet:
        print(f"{len(images)} {medium.noun}, {' to '.join(arguments.ends)}; see {arguments.out}")


def _between(noise: Tensor, sampler: Sampler, arguments: argparse.Namespace) -> Tensor:
    """The images from one of two ends to the other, or of the square between four corners."""
    frames = arguments.frames
    x_T = slerp(*noise, torch.linspace(0, 1, frames)) if len(noise) == 2 else slerp_grid(noise, frames, frames)
    images = sampler.sample(x_T=x_T, labels=arguments.label, guidance=arguments.guidance, batch_size=arguments.batch_size).cpu()
    if not images.isfinite().all():
        raise ValueError("the images are not finite; try --dtype float32")
    return images


def _noise(end: str, sampler: Sampler, medium: Medium, arguments: argparse.Namespace) -> Tensor:
    """(C, H, W) on the host: what the sampler makes the end from."""
    config = sampler.config
    if end.startswith("seed:"):
        if not end[5:].isdecimal():
            raise ValueError(f"{end!r} is no seed: write it as seed:7")
        sampler.check(seeds=[int(end[5:])], labels=arguments.label, guidance=arguments.guidance)
        return seeded_noise([int(end[5:])], INITIAL_NOISE, config.image_shape)[0]
    found = medium.load(end)
    if len(found) != 1:
        raise ValueError(f"an end is one file or a seed; {end!r} holds {len(found)}")
    return sampler.encode(found, labels=arguments.label, guidance=arguments.guidance, exact=arguments.exact)[0].cpu()


def _write(out: Path, images: Tensor, medium: Medium, arguments: argparse.Namespace) -> None:
    """A numbered file each, all in one picture, and of two ends a film that goes there and back."""
    medium.write(out, images)
    shown = medium.shown(images)
    scale = max(1, 64 // shown.shape[-1])
    save_image(out / "grid.png", image_grid(shown, columns=arguments.frames), scale)
    if len(arguments.ends) == 2:
        pictures = to_uint8(shown)
        save_gif(out / "film.gif", [*pictures, *pictures[-2::-1]], scale, hold=800)
    names = ("ends", "model", "steps", "spacing", "exact", "label", "guidance", "dtype")
    write_json(out / "interpolation.json", {name: getattr(arguments, name) for name in names})


if __name__ == "__main__":
    run_command(main)
