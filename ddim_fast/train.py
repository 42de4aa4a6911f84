"""Train a diffusion U-Net: ``python -m ddim_fast.train --data DATA --preset NAME --out DIR``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from .cli.options import CONVERT_HELP, EXECUTION, OUTPUT
from .cli.parser import CommandParser, parse_count, parse_positive, parse_seed, run_command
from .cli.progress import notice
from .cli.settings import TrainSettings
from .cli.stored import stored_options
from .io.files import write_json
from .io.locks import hold
from .io.processes import Processes
from .io.records import RUN
from .io.stopping import Stopped
from .jobs.outputs import require_parents
from .models.checkpoint import AUTOENCODER, packaged_models
from .models.config import PREDICTION_TYPES, preset_names
from .training.options import TRAINING_STATE, TrainingOptions

_EXAMPLES = """\
  python -m ddim_fast.train --data photos/ --preset cifar10-64 --out runs/photos
  python -m ddim_fast.train --data 'cifar10/train-*.parquet' --preset cifar10-64 --out runs/cifar10 --compile
  python -m ddim_fast.train --data fashion-mnist/ --preset grey-32 --class-conditional --no-flip --out runs/fashion
  python -m ddim_fast.train --data photos/ --recipe fast --steps 20000 --out runs/soon
  python -m ddim_fast.train --data spoken-digits/ --preset digits-mel --class-conditional --recipe fast --out runs/digits
  python -m ddim_fast.train --out runs/photos --resume
  torchrun --nproc-per-node 8 -m ddim_fast.train --data photos/ --batch-size 512 --out runs/photos
  python -m ddim_fast.train --init runs/photos --data more-photos/ --steps 5000 --lr 5e-5 --warmup 100 --out runs/tuned
  python -m ddim_fast.train --init runs/photos --set sample_size=64 --data photos/ --lr 1e-4 --out runs/photos-64
  python -m ddim_fast.train --data faces/ --preset autoencoder --set sample_size=64 --recipe fast --out runs/faces-autoencoder
  python -m ddim_fast.train --data faces/ --latents runs/faces-autoencoder --set base_channels=64 --out runs/faces
  python -m ddim_fast.sample --model runs/photos
"""

# Defaults of the options. "ddpm" has the papers' values, which the parser has too. "fast" is for much shorter runs:
# v-prediction (Salimans and Ho 2022) with min-SNR weights, which stop the timesteps from pulling in different directions (Hang
# et al. 2023; their gamma of 5 leaves grain in the images: docs/training.md); a higher learning rate, a short warm-up, and a
# cosine decay to zero, after which a run needs less averaging; so a shorter EMA (Karras et al. 2024: the best length grows with
# the run).
_RECIPES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "fast": {
        "lr": 5e-4,
        "warmup": 500,
        "lr_schedule": "cosine",
        "ema": 0.9995,
        "prediction_type": "v_prediction",
        "min_snr_gamma": 20.0,
    },
}

# Steps of each recipe on a GPU, and of both on a CPU, where the GPU's would take months. 2000 steps of the packaged
# fashion-mnist's network take about 45 minutes on two cores and reach most of the fall of its loss.
_STEPS, _CPU_STEPS = {"ddpm": TrainingOptions.steps, "fast": 100_000}, 2000

# Values of --precision, the former name of --dtype, and their present names.
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

# Options of a single call, not of the run: a resumed run does not remember them.
_PER_CALL = ("out", "resume", "device", "shard", "minutes", "quiet")


def _parser() -> CommandParser:
    default = TrainingOptions()
    p = CommandParser("train", "Train a diffusion U-Net on images or sounds.", _EXAMPLES)
    p.add_argument(
        "--data",
        metavar="SPEC",
        type=_absolute,
        help="a folder of images or sounds, Parquet, tar or IDX files, or a hub data set of images (owner/name)",
    )
    p.add_argument("--val", metavar="SPEC", type=_absolute, help=_VAL_HELP)
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    p.add_argument("--max-bad", metavar="N", type=parse_count, default=0, help=_MAX_BAD_HELP)
    p.add_argument(
        "--preset",
        metavar="NAME",
        choices=(*preset_names(), AUTOENCODER),
        default="cifar10-64",
        help=f"the network: {', '.join(preset_names())}; or {AUTOENCODER}, whose latents --latents trains a network on",
    )
    p.add_argument("--init", metavar="MODEL", type=_model, help=_INIT_HELP)
    p.add_argument("--latents", metavar="DIR", type=_absolute, help=_LATENTS_HELP)
    p.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="change fields of the preset, such as layers_per_block=1; with --init, only sample_size",
    )
    p.add_argument("--recipe", choices=_RECIPES, default="ddpm", help=_recipe_help())
    p.add_argument("--class-conditional", action="store_true", help=_CLASSES_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="the run's folder, also its checkpoint")
    p.add_argument(
        "--resume",
        metavar="auto",
        nargs="?",
        const=True,
        default=False,
        type=_auto,
        help="continue from the last checkpoint in --out; options not given are the run's own. auto: begin if there is none",
    )
    how = p.group("training")
    how.add_argument("--steps", metavar="N", type=parse_positive, help=_STEPS_HELP)
    how.add_argument("--batch-size", metavar="N", type=parse_positive, default=default.batch_size, help=_BATCH_HELP)
    how.add_argument("--accumulate", metavar="K", type=parse_positive, default=default.accumulate, help=_ACCUMULATE_HELP)
    how.add_argument("--optimizer", choices=("adam", "muon"), default=default.optimizer, help=_OPTIMIZER_HELP)
    how.add_argument("--lr", metavar="X", type=float, default=default.lr, help="peak learning rate")
    how.add_argument("--warmup", metavar="N", type=int, default=default.warmup, help="steps of linear warm-up")
    how.add_argument("--lr-schedule", choices=("constant", "cosine"), default=default.lr_schedule, help="after the warm-up")
    how.add_argument("--ema", metavar="X", type=float, default=default.ema, help="decay of the averaged weights")
    how.add_argument("--ema-snapshots", metavar="N", type=parse_positive, help=_SNAPSHOTS_HELP)
    how.add_argument("--grad-clip", metavar="X", type=float, default=default.grad_clip, help="largest gradient norm")
    how.add_argument("--skip-bad-steps", metavar="N", type=int, default=default.skip_bad_steps, help=_SKIP_HELP)
    how.add_argument("--dropout", metavar="X", type=float, help="dropout in the residual blocks (default: the preset's)")
    how.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="prediction type of the network (default: the preset's)"
    )
    how.add_argument(
        "--min-snr-gamma", metavar="X", type=float, help="min-SNR weighting; its authors use 5 (default: unweighted)"
    )
    how.add_argument("--consistency", metavar="T,T", type=_timesteps, help=_CONSISTENCY_HELP)
    how.add_argument(
        "--label-dropout",
        metavar="X",
        type=float,
        default=default.label_dropout,
        help="share of labels dropped in training, for guidance",
    )
    how.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the data, left to right (default: images, not sounds)",
    )
    execution = p.group(EXECUTION)
    dtype = execution.add_argument(
        "--dtype",
        choices=("auto", *_PRECISIONS.values()),
        default="auto",
        help="dtype of the computation; auto: bfloat16 autocast where the device is fast at it, otherwise float32",
    )
    p.add_former_name("--precision", dtype, {"auto": "auto", **_PRECISIONS})
    execution.add_argument("--compile", action="store_true", help="compile the training step with torch.compile")
    execution.add_argument("--shard", action="store_true", help=_SHARD_HELP)
    execution.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    how.add_argument(
        "--seed", metavar="N", type=parse_seed, default=default.seed, help="seed of weights, order, noise and dropout"
    )
    output = p.group(OUTPUT)
    output.add_argument("--log-every", metavar="N", type=parse_positive, default=50, help="steps between lines of stats.jsonl")
    output.add_argument("--save-every", metavar="N", type=parse_positive, default=1000, help="steps between checkpoints")
    output.add_argument("--keep", metavar="N", type=parse_positive, default=2, help=_KEEP_HELP)
    output.add_argument("--sample-every", metavar="N", type=parse_positive, default=1000, help="steps between sample grids")
    how.add_argument("--minutes", metavar="M", type=_minutes, help="stop after M minutes, with a checkpoint to --resume from")
    output.add_argument("--quiet", action="store_true", help="no progress bar and no lines about the run")
    return p


def _absolute(text: str) -> str:
    """An existing path made absolute, so that it holds from another working directory."""
    from .data.tar import expand_braces  # imports more than --help needs

    first = next(expand_braces(text))
    return os.path.abspath(text) if os.path.exists(first) or glob.glob(first) else text


def _auto(text: str) -> str:
    if text == "auto":
        return text
    raise argparse.ArgumentTypeError(f"it stands alone, or with auto; got {text!r}")


def _model(text: str) -> str:
    return text if text in packaged_models() else _absolute(text)


def _timesteps(text: str) -> list[int]:
    if all(part.isdecimal() for part in text.split(",")):
        return [int(part) for part in text.split(",")]
    raise argparse.ArgumentTypeError(f"{text!r} is not a list of timesteps such as 999,400")


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"a positive number of minutes; got {text!r}")


_CLASSES_HELP = (
    "condition the network on the data's labels; --class then takes the names of the folders or of the data set's classes"
)
_INIT_HELP = (
    "start from the network and weights of this model (named as --model of ddim_fast.sample), not from a preset and random "
    "weights. For data without labels, a class-conditional model keeps its null class only. For images twice as large (--set "
    "sample_size=64 for a 32x32 model), it gets one more level"
)
_STEPS_HELP = (
    f"optimiser steps in all (default: {_STEPS['ddpm']:,} on a GPU, with --recipe fast {_STEPS['fast']:,}; {_CPU_STEPS:,} on "
    "a CPU)"
)
_OPTIMIZER_HELP = (
    "adam, or muon: Muon for the hidden layers' weights and Adam for the others; in short runs of a small network it was the "
    "better one, at four times the learning rate"
)
_VAL_HELP = (
    "held-out images, as --data: each checkpoint's loss on them goes to stats.jsonl as val_loss, and the best one to OUT/best"
)
_MAX_BAD_HELP = (
    "leave out up to N images or sounds that cannot be read, of --data and of --val each; OUT/data.json lists those of --data"
)
_SKIP_HELP = (
    "let N steps of the run pass whose loss or gradient is infinite or NaN; they change no weights, and OUT/bad_steps.jsonl "
    "lists their images. One more ends the run"
)
_CONSISTENCY_HELP = (
    "tune the diffusion model of --init to make images in few steps, at these timesteps alone, such as 999,400; sample with "
    "--solver consistency --spacing adaptive --steps 2"
)
_BATCH_HELP = "images a step, in all processes together"
_ACCUMULATE_HELP = (
    "compute each batch in K slices, one after the other, for less memory; the result is the same but for rounding"
)
_SHARD_HELP = (
    "split weights, gradients, Adam's state and averages among torchrun's processes (FSDP2), for a network too large for one "
    "GPU; checkpoints stay whole"
)
_SNAPSHOTS_HELP = (
    "steps between snapshots in OUT/ema, from which ddim_fast.export --ema-length makes averages of any length (default: none)"
)
_KEEP_HELP = (
    "how many checkpoints are kept, the newest in OUT and those before it in OUT/checkpoints; --resume takes the newest that "
    "is not damaged"
)
_LATENTS_HELP = (
    "train on the latents of the autoencoder in this folder, from an earlier run or saved by diffusers. The checkpoint gets a "
    "copy; the preset's size and channels become the latents'"
)


def _recipe_help() -> str:
    fast = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in _RECIPES["fast"].items())
    return f"defaults of the options below: ddpm, the papers' values, or fast, for shorter runs: {fast}"


def main() -> None:
    parser = _parser()
    with Processes() as processes:
        settings, parser.hint, defaults = processes.from_first(lambda: _claimed(parser, processes.count))
        parser.set_defaults(**defaults)
        stopped = _train(parser, settings, processes)
        if stopped is not None:
            processes.wait()  # torchrun would end the first one with those that have ended
            raise Stopped(stopped)


def _claimed(parser: CommandParser, count: int) -> tuple[TrainSettings, str, dict[str, Any]]:
    """The settings of a run whose folder is now this process's, and the parser's hint and defaults, which depend on the run."""
    settings = _settings(parser)
    with parser.usage_errors():
        names = ("batch_size", "accumulate", "optimizer", "compile", "shard")
        TrainingOptions(**{name: getattr(settings, name) for name in names}).slice_size(count)
        if count > 1 and settings.device.startswith("cuda:"):
            raise ValueError(f"--device {settings.device}: each of {count} processes needs a GPU of its own; use --device cuda")
    hold(settings.out, f"--out {settings.out}")
    _check_out(parser, settings.out, settings.resume)  # by now there may be another run
    return settings, parser.hint, {name: parser.get_default(name) for name in vars(settings)}


def _train(parser: CommandParser, settings: TrainSettings, processes: Processes) -> int | None:
    """Train; returns the signal that ended the run, or None."""
    with notice("loading PyTorch", settings.quiet or not processes.is_first):
        # These import more than --help needs.
        from .cli.trainers import describe_run, find_device, find_start, make_trainer, save_grid
        from .jobs.training import run_training
        from .models.autoencoder import Autoencoder

    processes.from_first(lambda: _mend(settings))
    is_default = settings.steps is None
    device = processes.after_first(lambda: find_device(parser, settings, processes))
    if processes.count > 1:
        processes.group(device.type)  # now, as the processes prepare one after the other

    def prepare() -> Any:
        steps = _default_steps(settings.recipe, device.type) if is_default else settings.steps
        own, start = find_start(parser, dataclasses.replace(settings, steps=steps))
        return own, *make_trainer(parser, own, start, device, processes)

    settings, trainer, codec, seen = processes.after_first(prepare)
    out = settings.out
    most, least = processes.largest([trainer.step, -trainer.step])
    if most != -least:
        raise ValueError(f"--out {out}: processes find different checkpoints there; name a folder that their machines share")
    # Torch warns of the layout of 1x1 kernels, which differs in channels_last by name alone.
    if processes.count > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if processes.is_first:
        if not settings.quiet:
            print(describe_run(settings, trainer, is_default), file=sys.stderr)
        seen.save(out)
        write_json(out / RUN, {name: value for name, value in vars(settings).items() if name not in _PER_CALL})
        if codec is not None:
            codec.autoencoder.save_pretrained(out / AUTOENCODER)
    try:
        stopped = run_training(
            trainer,
            out,
            functools.partial(save_grid, trainer, codec),
            log_every=settings.log_every,
            save_every=settings.save_every,
            sample_every=settings.sample_every,
            keep=settings.keep,
            minutes=settings.minutes,
            quiet=settings.quiet,
            validation=settings.val or "",
        )
    except RuntimeError as error:
        if not processes.is_lost(error):
            raise
        kept = f"{out} keeps its last checkpoint" if (out / TRAINING_STATE).is_file() else "there is no checkpoint yet"
        raise RuntimeError(
            f"another process of this run has ended, so this one ends too ({kept}; the same command with --resume goes on)"
        ) from error
    if not processes.is_first:
        return stopped
    if stopped is not None:
        print(
            f"stopped: {out} holds a checkpoint of step {trainer.step}; the same command with --resume goes on", file=sys.stderr
        )
    elif isinstance(trainer.model, Autoencoder):
        print(f"trained to step {trainer.step}; train on its latents with: python -m ddim_fast.train --latents {out}")
    else:
        few = settings.consistency
        how = "" if few is None else f" --solver consistency --spacing adaptive --steps {len(few)}"
        print(f"trained to step {trainer.step}; sample with: python -m ddim_fast.sample --model {out}{how}")
    return stopped


def _default_steps(recipe: str, device: str) -> int:
    return _CPU_STEPS if device == "cpu" else _STEPS[recipe]


def _mend(settings: TrainSettings) -> None:
    """Remove what a killed run has left, and put the newest whole checkpoint into its place."""
    from .training.checkpoints import recover, remove_run_remains

    remove_run_remains(settings.out)
    if settings.resume and (line := recover(settings.out)) is not None:
        print(f"warning: {line}", file=sys.stderr)


def _settings(parser: CommandParser) -> TrainSettings:
    """The settings of a run that can start or resume in ``--out``; otherwise a usage error."""
    # These options decide the defaults of the others.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = parser.error  # type: ignore[method-assign]
    first.add_argument("--out", type=Path, default=Path())
    first.add_argument("--resume", nargs="?", const=True, default=False)
    first.add_argument("--recipe", default="ddpm")
    given = first.parse_known_args()[0]
    record = given.out / RUN
    resume = given.resume is True or (given.resume == "auto" and record.is_file())
    stored = _stored(parser, record) if resume and record.is_file() else {}
    parser.set_defaults(**(stored if resume else _RECIPES.get(given.recipe, {})))
    settings = TrainSettings(**{**vars(parser.parse_args()), "resume": resume})
    out = settings.out
    _check_out(parser, out, settings.resume)
    if settings.resume:
        parser.hint = f"options that are not given are those of {record}"
        if given.recipe not in ("ddpm", stored.get("recipe")):
            parser.error(f"--recipe {given.recipe}: a run goes on with its own; begin another with another --out")
        if settings.optimizer != stored.get("optimizer", "adam"):
            parser.error(f"--optimizer {settings.optimizer}: a run goes on with its own; begin another with another --out")
        if settings.latents != stored.get("latents"):
            parser.error(f"--latents {settings.latents}: a run goes on with its own; begin another with another --out")
    if settings.data is None:
        parser.error("--data is required")
    if out.is_file():
        parser.error(f"--out {out} is a file; name a folder")
    with parser.usage_errors():
        require_parents("--out", out)
    return settings


def _check_out(parser: CommandParser, out: Path, resume: bool) -> None:
    """A usage error where a run cannot begin, or go on, in ``out``."""
    if resume:
        if not (out / RUN).is_file():
            parser.error(f"--resume: there is no run in {out}")
        if _holds_checkpoint(out) and not (out / TRAINING_STATE).is_file():
            parser.error(
                f"--resume: {out} has a checkpoint, but no {TRAINING_STATE} to go on from; --init {out} "
                "begins another run, in another --out, with its weights"
            )
    elif (out / RUN).exists():
        parser.error(f"--out {out} holds a run already; go on with --resume or choose another folder")
    elif _holds_checkpoint(out):
        parser.error(f"--out {out} holds a checkpoint already, which is no run's; choose another folder")


def _stored(parser: CommandParser, record: Path) -> dict[str, Any]:
    """The options that a run was begun with."""

    def update(values: dict[str, Any]) -> None:
        if "precision" in values:
            former = values.pop("precision")
            values["dtype"] = _PRECISIONS.get(former, former)
        few = values.get("consistency")
        if isinstance(few, list) and all(type(timestep) is int for timestep in few):
            values["consistency"] = ",".join(map(str, few))  # as it is given

    known = {field.name for field in dataclasses.fields(TrainSettings)} - set(_PER_CALL)
    return stored_options(parser, record, ["--out", str(record.parent)], known, update)


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model_index.json", "model.safetensors", TRAINING_STATE))


if __name__ == "__main__":
    run_command(main)
