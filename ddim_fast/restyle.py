"""Convert recordings to another voice or word: ``python -m ddim_fast.restyle SOUNDS --model MODEL --to CLASS``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cli.comparison import change_images, new_folder, write_comparison
from .cli.options import (
    CONVERT_HELP,
    EXACT_HELP,
    SOUND_CLASS_HELP,
    SOUND_MODEL,
    SOUNDS_HELP,
    SamplerSettings,
    add_sampler_options,
    one_class,
    settle_sampler,
)
from .cli.parser import CommandParser, run_command
from .cli.progress import announce, count_of
from .cli.samplers import audio_of, batch_size_of, job_record, make_sampler

if TYPE_CHECKING:
    from torch import Tensor

    from .audio.codec import Codec
    from .diffusion.sampler import Sampler

_EXAMPLES = """\
  python -m ddim_fast.restyle seven.wav --model runs/digits --from 7/jackson --to 7/theo
  python -m ddim_fast.restyle recordings/ --model runs/digits --to 3/nicolas --guidance 2 --loudness-std 4
  python -m ddim_fast.restyle seven.wav --model runs/digits --from 7/jackson --to 7/theo --control loud.wav
"""

_CONTROL_HELP = "recording whose loudness to follow, frame by frame (default: each recording's own)"
_STD_HELP = "standard deviation of a frame's loudness from that curve, in dB; inf leaves it free"


def _parser() -> CommandParser:
    p = CommandParser("restyle", "Convert recordings to another voice or word, and keep their loudness.", _EXAMPLES)
    p.add_argument("sounds", nargs="+", metavar="SOUNDS", help=SOUNDS_HELP)
    p.add_argument("--from", dest="source", metavar="CLASS", help=SOUND_CLASS_HELP)
    p.add_argument("--to", dest="target", metavar="CLASS", required=True, help="target class, a name or number")
    p.add_argument("--control", metavar="SOUND", help=_CONTROL_HELP)
    p.add_argument("--loudness-std", metavar="X", type=float, default=8.0, help=_STD_HELP)
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    p.add_argument("--exact", action="store_true", help=EXACT_HELP)
    add_sampler_options(p, "restyled", "a new or empty folder", model=SOUND_MODEL)
    return p


@dataclass(frozen=True, kw_only=True)
class RestyleSettings(SamplerSettings):
    """The command's settings, from its options."""

    sounds: list[str]
    source: str | None
    target: str
    control: str | None
    loudness_std: float
    convert: bool
    exact: bool


def main() -> None:
    parser = _parser()
    settings = RestyleSettings(**settle_sampler(parser, vars(parser.parse_args())))
    sampler = make_sampler(parser, settings)
    audio = audio_of(sampler)
    if audio is None:
        parser.error(f"--model {settings.model} makes images, not sounds; see python -m ddim_fast.edit")
    from .audio.control import loudness_guidance  # these import more than --help needs
    from .cli.sounds import Sounds
    from .diffusion.sampler import Sampler

    medium = Sounds(audio, settings.convert)
    with parser.usage_errors():
        target = one_class(settings.target, sampler.config, "--to")
        images, source, names = medium.load_labelled(settings.sounds, settings.source, sampler.config, "--from")
        if source is None and settings.source is None:
            raise ValueError("the recordings have no class: give one by --from, or say --from none")
        sampler.check(x_T=images, labels=target, guidance=settings.guidance)
        assert isinstance(sampler, Sampler)  # a latent model has refused the images before
        curve = medium.codec.loudness(images if settings.control is None else medium.load(settings.control))
        if settings.control is not None and len(curve) != 1:
            raise ValueError(f"--control is one recording; {settings.control!r} holds {len(curve)}")
        curve = curve.expand(len(images), -1)
        loudness_guidance(sampler, medium.codec, curve, settings.loudness_std)  # for its errors
    with new_folder(parser, settings.out, "restyled") as (folder, place):
        announce(settings, sampler, count_of(len(images), "sounds"), settings.quiet)
        restyled = _restyle(sampler, medium.codec, images, source, target, curve, settings)
        errors = (medium.codec.loudness(restyled) - curve).abs().mean(1)
        how = settings.own()
        if how["loudness-std"] == float("inf"):  # JSON has no infinity
            how["loudness-std"] = "inf"
        record = job_record("restyle", how, settings, sampler)
        figures = {"loudness_errors": dict(zip(names, errors.tolist(), strict=True))}
        write_comparison(medium, folder, names, images, restyled, {**record, **figures})
    if not settings.quiet:
        print(f"{count_of(len(images), 'sounds')} restyled, their loudness {errors.mean():.2g} dB from the curve; see {place}")


def _restyle(
    sampler: Sampler,
    codec: Codec,
    images: Tensor,
    source: Tensor | None,
    target: int,
    curve: Tensor,
    settings: RestyleSettings,
) -> Tensor:
    """(N, C, H, W) on the host, a batch at a time."""
    from .audio.control import restyle

    options: dict[str, Any] = {"std": settings.loudness_std, "guidance": settings.guidance, "exact": settings.exact}

    def change(part: slice) -> Tensor:
        labels = None if source is None else source[part]
        return restyle(sampler, codec, images[part], source=labels, target=target, curve=curve[part], **options)

    remedy = "--dtype float32, or a larger --loudness-std"
    size = batch_size_of(settings, sampler)
    return change_images(change, len(images), size, noun="sounds", runs=2, quiet=settings.quiet, remedy=remedy)


if __name__ == "__main__":
    run_command(main)
