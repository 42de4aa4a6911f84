"""Encode images to noise and decode them again: ``python -m ddim_fast.reconstruct IMAGES``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli.comparison import change_images, new_folder, save_comparison
from .cli.modality import medium_of
from .cli.options import (
    EXACT_HELP,
    IMAGE_CLASS_HELP,
    IMAGES_HELP,
    SamplerSettings,
    add_resize_option,
    add_sampler_options,
    settle_sampler,
)
from .cli.parser import CommandParser, run_command
from .cli.progress import announce, count_of, say_resized
from .cli.samplers import batch_size_of, job_record, load_labelled, make_sampler, require_pictures
from .data.resizing import Resizer
from .io.files import write_json
from .io.records import RECORD

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.samplers import AnySampler

_EXAMPLES = """\
  python -m ddim_fast.reconstruct photo.png --class truck
  python -m ddim_fast.reconstruct photos/ --steps 50 --out encoded
  python -m ddim_fast.reconstruct photos/ --steps 10 --exact
"""


def _parser() -> CommandParser:
    p = CommandParser("reconstruct", "Encode images to noise by DDIM, and decode them again.", _EXAMPLES)
    p.add_argument("images", nargs="+", metavar="IMAGES", help=IMAGES_HELP)
    p.add_argument("--exact", action="store_true", help=EXACT_HELP)
    add_resize_option(p)
    add_sampler_options(p, "reconstruction", "a new or empty folder")
    p.add_argument("--class", dest="label", metavar="CLASS", help=IMAGE_CLASS_HELP)
    return p


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings(SamplerSettings):
    """The command's settings, from its options."""

    images: list[str]
    exact: bool
    resize: str
    label: str | None


def main() -> None:
    parser = _parser()
    settings = ReconstructSettings(**settle_sampler(parser, vars(parser.parse_args())))
    sampler = make_sampler(parser, settings)
    require_pictures(parser, settings.model, sampler, "see python -m ddim_fast.restyle")
    resizer = Resizer(sampler.image_shape[1], settings.resize)
    with parser.usage_errors():
        images, labels, names = load_labelled(settings.images, settings.label, sampler, resizer)
        sampler.check(seeds=range(len(images)), labels=labels, guidance=settings.guidance)
    with new_folder(parser, settings.out, "reconstruction") as (folder, place):
        say_resized(resizer, settings.quiet)
        announce(settings, sampler, count_of(len(images), "images"), settings.quiet)
        errors = _reconstruct(sampler, images, labels, names, settings, folder)
    if not settings.quiet:
        how = f"in {len(sampler.timesteps)} steps{', exactly' if settings.exact else ''}"
        print(
            f"{count_of(len(images), 'images')} encoded and decoded {how}: "
            f"mean squared error {errors.mean():.2g} a pixel in [0, 1] (largest {errors.max():.2g}); see {place}"
        )


def _reconstruct(
    sampler: AnySampler,
    images: Tensor,
    labels: Sequence[int] | None,
    names: Sequence[str],
    settings: ReconstructSettings,
    folder: Path,
) -> Tensor:
    """Write the latents, the decoded images, their errors and a comparison; returns the errors."""
    import torch
    from safetensors.torch import save_file

    latents, size, medium = [], batch_size_of(settings, sampler), medium_of(sampler)

    def reconstruct(part: slice) -> Tensor:
        request: dict[str, Any] = {"labels": None if labels is None else labels[part], "guidance": settings.guidance}
        latents.append(sampler.encode(images[part], **request, exact=settings.exact).cpu())
        return sampler.sample(x_T=latents[-1], **request, batch_size=size)

    again = change_images(reconstruct, len(images), size, noun="images", runs=2, quiet=settings.quiet, result="reconstructions")
    noise = torch.cat(latents)
    errors = ((again - images) / 2).double().square().mean(dim=(1, 2, 3))
    how = {name: getattr(settings, name) for name in ("model", "steps", "spacing", "exact", "guidance")}
    save_file(
        {"x_T": noise} | ({} if labels is None else {"labels": torch.tensor(labels)}),
        folder / "latents.safetensors",
        {name: str(value) for name, value in how.items()},
    )
    medium.write(folder, names, again)
    record = job_record("reconstruct", settings.own(), settings, sampler)
    figures = {"mean": float(errors.mean()), "errors": dict(zip(names, errors.tolist(), strict=True))}
    write_json(folder / RECORD, {**record, **figures, "finished": True})
    # Three standard deviations of noise are black or white; a latent's noise is no picture.
    rows = [images, noise / 3, again] if noise.shape == images.shape else [images, again]
    save_comparison(medium, folder, *rows)
    return errors


if __name__ == "__main__":
    run_command(main)
