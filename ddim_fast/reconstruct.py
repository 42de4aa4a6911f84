"""Encode images to noise and decode them again: ``python -m ddim_fast.reconstruct IMAGES``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .cli.options import IMAGE_CLASS_HELP, IMAGES_HELP, add_sampler_options
from .cli.parser import CommandParser, parse_class, run_command
from .cli.samplers import load_labelled, make_sampler, require_pictures
from .io.files import atomic_folder, write_json
from .io.pictures import image_grid, save_image
from .io.records import COMPARISON, RECONSTRUCTION

if TYPE_CHECKING:
    from .cli.samplers import AnySampler

_EXAMPLES = """\
  python -m ddim_fast.reconstruct photo.png --class 9
  python -m ddim_fast.reconstruct photos/ --steps 50 --out encoded
  python -m ddim_fast.reconstruct photos/ --steps 10 --exact
"""

# A picture of more is no longer one to look at.
_SHOWN = 20

_EXACT_HELP = "invert each step exactly, which takes five to ten times as long, instead of DDIM's approximation"


def _parser() -> CommandParser:
    p = CommandParser("reconstruct", "Encode images to noise by DDIM, and decode them again.", _EXAMPLES)
    p.add_argument("images", nargs="+", metavar="IMAGES", help=IMAGES_HELP)
    p.add_argument("--exact", action="store_true", help=_EXACT_HELP)
    add_sampler_options(p)
    p.add_argument("--class", dest="label", metavar="N", type=parse_class, help=IMAGE_CLASS_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("reconstruction"), help="a new or empty folder")
    p.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return p


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    sampler = make_sampler(parser, arguments)
    require_pictures(parser, arguments.model, sampler, "see python -m ddim_fast.restyle")
    with parser.usage_errors():
        images, labels = load_labelled(arguments.images, arguments.label, sampler)
        sampler.check(seeds=range(len(images)), labels=labels, guidance=arguments.guidance)
    try:
        with atomic_folder(arguments.out) as out:
            errors = _reconstruct(sampler, images, labels, arguments, out)
    except FileExistsError as error:
        parser.error(f"--out: {error}")
    if not arguments.quiet:
        how = f"in {len(sampler.timesteps)} steps{', exactly' if arguments.exact else ''}"
        print(
            f"{len(images)} images encoded and decoded {how}: "
            f"mean squared error {errors.mean():.2g} a pixel in [0, 1] (largest {errors.max():.2g}); see {arguments.out}"
        )


def _reconstruct(
    sampler: AnySampler, images: Tensor, labels: Sequence[int] | None, arguments: argparse.Namespace, out: Path
) -> Tensor:
    """Writes the latents, the error of each image and a picture; returns the errors."""
    latents, decoded = [], []
    with tqdm(total=len(images), unit=" images", disable=arguments.quiet) as bar:
        for start in range(0, len(images), arguments.batch_size):
            part = slice(start, start + arguments.batch_size)
            request = {"labels": None if labels is None else labels[part], "guidance": arguments.guidance}
            latents.append(sampler.encode(images[part], **request, exact=arguments.exact).cpu())
            decoded.append(sampler.sample(x_T=latents[-1], **request, batch_size=arguments.batch_size).cpu())
            bar.update(len(latents[-1]))
    noise, again = torch.cat(latents), torch.cat(decoded)
    if not again.isfinite().all():
        raise ValueError("the reconstructions are not finite; try --dtype float32")
    errors = ((again - images) / 2).double().square().mean(dim=(1, 2, 3))
    settings = {name: getattr(arguments, name) for name in ("model", "steps", "spacing", "exact", "guidance")}
    save_file(
        {"x_T": noise} | ({} if labels is None else {"labels": torch.tensor(labels)}),
        out / "latents.safetensors",
        {name: str(value) for name, value in settings.items()},
    )
    write_json(out / RECONSTRUCTION, {**settings, "mean": float(errors.mean()), "errors": errors.tolist()})
    # Noise of three standard deviations is black or white; that of latents is no picture.
    shown = [images, noise / 3, again] if noise.shape == images.shape else [images, again]
    rows = torch.cat([part[:_SHOWN] for part in shown])
    save_image(out / COMPARISON, image_grid(rows, columns=min(_SHOWN, len(images))), scale=max(1, 64 // images.shape[-1]))
    return errors


if __name__ == "__main__":
    run_command(main)
