"""Restore recordings by a model that was not trained for it: ``python -m ddim_fast.restore_sounds SOUNDS --gap 0.4 0.5``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cli.comparison import change_images, new_folder, write_comparison
from .cli.options import (
    CONVERT_HELP,
    SOUND_CLASS_HELP,
    SOUND_MODEL,
    SOUNDS_HELP,
    SamplerSettings,
    add_sampler_options,
    settle_sampler,
)
from .cli.parser import CommandParser, run_command
from .cli.progress import announce, count_of
from .cli.samplers import audio_of, batch_size_of, job_record, make_sampler

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.samplers import AnySampler
    from .diffusion.degradations import Mask

_EXAMPLES = """\
  python -m ddim_fast.restore_sounds seven.wav --model runs/digits --class 7/jackson --gap 0.45 0.55
  python -m ddim_fast.restore_sounds recordings/ --model runs/digits --cutoff 2000 --guidance 2
"""

_GAP_HELP = "fill in the gap between two times, in seconds of the model's sound; a recording lies in its middle"
_CUTOFF_HELP = "extend the bandwidth: fill in the frequencies above this one, in Hz"


def _parser() -> CommandParser:
    p = CommandParser("restore_sounds", "Restore recordings: fill in a gap, or extend the bandwidth.", _EXAMPLES)
    p.add_argument("sounds", nargs="+", metavar="SOUNDS", help=SOUNDS_HELP)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--gap", metavar=("START", "END"), nargs=2, type=float, help=_GAP_HELP)
    what.add_argument("--cutoff", metavar="HZ", type=float, help=_CUTOFF_HELP)
    p.add_argument("--class", dest="label", metavar="CLASS", help=SOUND_CLASS_HELP)
    p.add_argument("--seed", metavar="N", type=int, default=0, help="sound i is restored with seed N + i")
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    add_sampler_options(p, "restored", "a new or empty folder", model=SOUND_MODEL)
    return p


@dataclass(frozen=True, kw_only=True)
class RestoreSoundsSettings(SamplerSettings):
    """The command's settings, from its options."""

    sounds: list[str]
    gap: list[float] | None
    cutoff: float | None
    label: str | None
    seed: int
    convert: bool


def main() -> None:
    parser = _parser()
    settings = RestoreSoundsSettings(**settle_sampler(parser, vars(parser.parse_args())))
    sampler = make_sampler(parser, settings)
    audio = audio_of(sampler)
    if audio is None:
        parser.error(f"--model {settings.model} makes images, not sounds")
    import torch  # these import more than --help needs

    from .audio.restoration import band_limit, gap
    from .cli.sounds import Sounds

    medium = Sounds(audio, settings.convert)
    with parser.usage_errors():
        if settings.gap is not None:
            operator = gap(audio, *settings.gap)
        else:
            assert settings.cutoff is not None  # one of the two is required
            operator = band_limit(audio, settings.cutoff)
        images, labels, names = medium.load_labelled(settings.sounds, settings.label, sampler.config)
        sampler.check(seeds=range(settings.seed, settings.seed + len(images)), labels=labels, guidance=settings.guidance)
    damaged = torch.where(operator.known > 0, images, medium.codec.silence)
    with new_folder(parser, settings.out, "restored") as (folder, place):
        announce(settings, sampler, count_of(len(images), "sounds"), settings.quiet)
        restored = _restore(sampler, operator, images, labels, settings)
        write_comparison(
            medium, folder, names, damaged, restored, job_record("restore_sounds", settings.own(), settings, sampler)
        )
    if not settings.quiet:
        print(f"{count_of(len(images), 'sounds')} restored; see {place}")


def _restore(
    sampler: AnySampler, operator: Mask, images: Tensor, labels: Tensor | None, settings: RestoreSoundsSettings
) -> Tensor:
    """(N, C, H, W) on the host, a batch at a time."""
    seeds = range(settings.seed, settings.seed + len(images))

    def restore(part: slice) -> Tensor:
        request: dict[str, Any] = {"labels": None if labels is None else labels[part], "guidance": settings.guidance}
        return sampler.restore(operator(images[part]), operator, seeds=seeds[part], **request)

    size = batch_size_of(settings, sampler)
    return change_images(restore, len(images), size, noun="sounds", runs=1, quiet=settings.quiet)


if __name__ == "__main__":
    run_command(main)
