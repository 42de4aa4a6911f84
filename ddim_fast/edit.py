"""Edit images: ``python -m ddim_fast.edit IMAGES --strength 0.6``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cli.comparison import change_images, new_folder, write_comparison
from .cli.modality import medium_of
from .cli.options import (
    EXACT_HELP,
    IMAGE_CLASS_HELP,
    IMAGES_HELP,
    SamplerSettings,
    add_resize_option,
    add_sampler_options,
    one_class,
    settle_sampler,
)
from .cli.parser import CommandParser, run_command
from .cli.progress import announce, count_of, say_resized
from .cli.samplers import batch_size_of, job_record, load_labelled, make_sampler, require_pictures
from .data.resizing import Resizer
from .io.progress import Bar

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.samplers import AnySampler

_EXAMPLES = """\
  python -m ddim_fast.edit photos/ --strength 0.6
  python -m ddim_fast.edit horses/ --from horse --to deer --guidance 2 --out deer
  python -m ddim_fast.edit cars/ --class automobile --direction dark/ bright/ --amount -1
"""

# The two names of the option for the images' class.
_CLASS = "--class/--from"

_STRENGTH_HELP = (
    "noise level of the edit, 0 to 1; higher keeps less of the images. Alone: SDEdit, which adds noise and removes it. With "
    "--to or --direction: how far the images are encoded (default there: 1)"
)
_CLASS_HELP = f"{IMAGE_CLASS_HELP}; SDEdit makes images of this class"
_DIRECTION_HELP = "images with an attribute, and images without it: move along the mean difference of their latents"


def _parser() -> CommandParser:
    p = CommandParser("edit", "Edit images: by SDEdit, into another class, or along an attribute.", _EXAMPLES)
    p.add_argument("images", nargs="+", metavar="IMAGES", help=IMAGES_HELP)
    p.add_argument("--strength", metavar="X", type=float, help=_STRENGTH_HELP)
    p.add_argument("--seed", metavar="N", type=int, help="SDEdit: image i gets the noise of seed N + i (default: 0)")
    p.add_argument("--class", "--from", dest="label", metavar="CLASS", help=_CLASS_HELP)
    way = p.add_mutually_exclusive_group()
    way.add_argument("--to", metavar="CLASS", help="encode the images under their class and decode them under this one")
    way.add_argument("--direction", metavar=("WITH", "WITHOUT"), nargs=2, help=_DIRECTION_HELP)
    p.add_argument("--amount", metavar="X", type=float, help="how far along the direction (default: 1)")
    p.add_argument("--exact", action="store_true", help=EXACT_HELP)
    add_resize_option(p)
    add_sampler_options(p, "edited", "a new or empty folder")
    return p


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    sampler = make_sampler(parser, settings)
    from .diffusion.editing import start_timestep  # imports more than --help needs

    require_pictures(parser, settings.model, sampler, "see python -m ddim_fast.restyle")
    resizer = Resizer(sampler.image_shape[1], settings.resize)
    with parser.usage_errors():
        start = start_timestep(settings.strength, sampler.config.num_train_timesteps)
        if start is not None:
            sampler.starting_at(start)
        to = None if settings.to is None else one_class(settings.to, sampler.config, "--to")
        images, labels, names = load_labelled(settings.images, settings.label, sampler, resizer, _CLASS)
        seeds = range(settings.seed, settings.seed + len(images))
        target = labels if to is None else to
        sampler.check(seeds=seeds, labels=labels)
        sampler.check(seeds=seeds, labels=target, guidance=settings.guidance)
        if to is not None and labels is None and settings.label is None:
            raise ValueError("--to needs the images' own class: give it by --from, or say --from none")
        examples = [load_labelled([spec], settings.label, sampler, resizer, _CLASS)[:2] for spec in settings.direction or ()]
    with new_folder(parser, settings.out, "edited") as (folder, place):
        say_resized(resizer, settings.quiet)
        announce(settings, sampler, count_of(len(images), "images"), settings.quiet)
        direction = _direction(sampler, examples, settings)
        edited = _edit(sampler, images, labels, to, direction, settings)
        record = job_record("edit", settings.own(), settings, sampler)
        write_comparison(medium_of(sampler), folder, names, images, edited, record)
    if not settings.quiet:
        print(f"{count_of(len(images), 'images')} edited; see {place}")


@dataclass(frozen=True, kw_only=True)
class EditSettings(SamplerSettings):
    """The command's settings, from its options."""

    images: list[str]
    strength: float
    seed: int
    label: str | None
    to: str | None
    direction: list[str] | None
    amount: float
    exact: bool
    resize: str


def _settings(parser: CommandParser) -> EditSettings:
    """The settings; options of different edits together are a usage error."""
    options = vars(parser.parse_args())
    encodes = options["to"] is not None or options["direction"] is not None
    if not encodes and options["strength"] is None:
        parser.error("say how to edit: --strength for SDEdit, --to for another class, or --direction for an attribute")
    for option, given, ways, fits in (
        ("--seed", options["seed"] is not None, "SDEdit, without --to and --direction", not encodes),
        ("--exact", options["exact"], "--to and --direction, which encode the images", encodes),
        ("--amount", options["amount"] is not None, "--direction", options["direction"] is not None),
    ):
        if given and not fits:
            parser.error(f"{option} belongs to {ways}")
    if options["amount"] is not None and not math.isfinite(options["amount"]):
        parser.error(f"--amount must be a finite number; got {options['amount']}")
    for name, default in (("strength", 1.0), ("seed", 0), ("amount", 1.0)):
        options[name] = default if options[name] is None else options[name]
    return EditSettings(**settle_sampler(parser, options))


def _direction(sampler: AnySampler, examples: list[tuple[Tensor, list[int] | None]], settings: EditSettings) -> Tensor | None:
    """The direction from images without an attribute to images with it; None without --direction."""
    from .diffusion.editing import attribute_direction

    if not examples:
        return None
    (with_it, with_labels), (without_it, without_labels) = examples
    with Bar(len(with_it) + len(without_it), "examples", shown=not settings.quiet):
        return attribute_direction(
            sampler,
            with_it,
            without_it,
            labels=(with_labels, without_labels),
            strength=settings.strength,
            exact=settings.exact,
            batch_size=batch_size_of(settings, sampler),
        )


def _edit(
    sampler: AnySampler,
    images: Tensor,
    labels: list[int] | None,
    to: int | None,
    direction: Tensor | None,
    settings: EditSettings,
) -> Tensor:
    """(N, C, H, W) on the host, a batch at a time."""
    from .diffusion.editing import move_along, sdedit, swap_class

    seeds = range(settings.seed, settings.seed + len(images))
    size = batch_size_of(settings, sampler)
    common: dict[str, Any] = {"strength": settings.strength, "guidance": settings.guidance, "batch_size": size}

    def edit(part: slice) -> Tensor:
        batch, classes = images[part], None if labels is None else labels[part]
        if to is not None:
            return swap_class(sampler, batch, source=classes, target=to, exact=settings.exact, **common)
        if direction is not None:
            amount = settings.amount
            return move_along(sampler, batch, direction, amount, labels=classes, exact=settings.exact, **common)
        return sdedit(sampler, batch, labels=classes, seeds=seeds[part], **common)

    # SDEdit only denoises; the other edits encode first.
    runs = 1 if settings.to is None and direction is None else 2
    return change_images(edit, len(images), size, noun="images", runs=runs, quiet=settings.quiet, result="edited images")


if __name__ == "__main__":
    run_command(main)
