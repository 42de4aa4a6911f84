"""Train a diffusion U-Net: ``python -m ddim_fast.train --data DATA --preset NAME --out DIR``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import glob
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cli.modality import medium_of
from .cli.options import CONVERT_HELP
from .cli.parser import CommandParser, parse_positive, run_command
from .cli.stored import stored_options
from .data.images import ImageSet, load_images, to_unit_range
from .data.latents import encoded, latent_space
from .data.record import DATA_RECORD, DataRecord
from .diffusion.latent import LatentCodec, LatentSampler
from .diffusion.sampler import Sampler
from .engine import why_not_compiled
from .interop.autoencoder import load_autoencoder
from .io.files import write_json
from .io.pictures import image_grid, save_image
from .io.records import RUN
from .jobs.training import run_training
from .models.audio import AudioConfig
from .models.autoencoder import Autoencoder
from .models.checkpoint import AUTOENCODER, load_config, local_model, packaged_models
from .models.config import PREDICTION_TYPES, AutoencoderConfig, UNetConfig, preset_names
from .models.formats.diffusers import fold_class
from .models.growth import enclose
from .models.unet import UNet
from .ops.devices import bf16_is_fast, pick_device
from .training.loop import TRAINING_STATE, Trainer, TrainingOptions

_EXAMPLES = """\
  python -m ddim_fast.train --data photos/ --preset cifar10-64 --out runs/photos
  python -m ddim_fast.train --data 'cifar10/train-*.parquet' --preset cifar10-64 --out runs/cifar10 --compile
  python -m ddim_fast.train --data fashion-mnist/ --preset grey-32 --class-conditional --no-flip --out runs/fashion
  python -m ddim_fast.train --data photos/ --recipe fast --steps 20000 --out runs/soon
  python -m ddim_fast.train --data spoken-digits/ --preset digits-mel --class-conditional --recipe fast --out runs/digits
  python -m ddim_fast.train --out runs/photos --resume
  python -m ddim_fast.train --init runs/photos --data more-photos/ --steps 5000 --lr 5e-5 --warmup 100 --out runs/tuned
  python -m ddim_fast.train --init runs/photos --set sample_size=64 --data photos/ --lr 1e-4 --out runs/photos-64
  python -m ddim_fast.train --data faces/ --preset autoencoder --set sample_size=64 --recipe fast --out runs/faces-autoencoder
  python -m ddim_fast.train --data faces/ --latents runs/faces-autoencoder --set base_channels=64 --out runs/faces
  python -m ddim_fast.sample --model runs/photos
"""

# Values of options that are not given. "ddpm" is the papers', which the options' own defaults are. "fast" is for runs that are
# much shorter: v-prediction (Salimans and Ho 2022) with min-SNR weights, which stop the timesteps from pulling in different
# directions (Hang et al. 2023; their gamma of 5 leaves grain in the images: docs/quality.md); a higher learning rate, a short
# warm-up, and a cosine to zero, after which a run needs less averaging; so a shorter EMA (Karras et al. 2024: the best length
# grows with that of the run).
_RECIPES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "fast": {
        "steps": 100_000,
        "lr": 5e-4,
        "warmup": 500,
        "lr_schedule": "cosine",
        "ema": 0.9995,
        "prediction_type": "v_prediction",
        "min_snr_gamma": 20.0,
    },
}

# Values of --precision, as --dtype was called, and what they are now.
_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}

# What describes how a run goes on rather than what it is: not remembered from one call to the next.
_PER_CALL = ("out", "resume", "device", "minutes", "quiet")


def _parser() -> CommandParser:
    default = TrainingOptions()
    p = CommandParser("train", "Train a diffusion U-Net on images or sounds.", _EXAMPLES)
    p.add_argument(
        "--data",
        metavar="SPEC",
        type=_absolute,
        help="a folder of images or sounds, Parquet files, IDX files, or a hub data set of images (owner/name)",
    )
    p.add_argument("--convert", action="store_true", help=CONVERT_HELP)
    p.add_argument(
        "--preset",
        metavar="NAME",
        choices=(*preset_names(), AUTOENCODER),
        default="cifar10-64",
        help=f"the network: {', '.join(preset_names())}; or {AUTOENCODER}, a network to train others in the latent space of",
    )
    p.add_argument("--init", metavar="MODEL", type=_model, help=_INIT_HELP)
    p.add_argument("--latents", metavar="DIR", type=_absolute, help=_LATENTS_HELP)
    p.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="change fields of the preset, such as layers_per_block=1; with --init, sample_size alone",
    )
    p.add_argument("--recipe", choices=_RECIPES, default="ddpm", help=_recipe_help())
    p.add_argument("--class-conditional", action="store_true", help="condition the network on the data's labels")
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="the run's folder, which is also the checkpoint")
    p.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --out; options not given are the run's own",
    )
    p.add_argument("--steps", metavar="N", type=parse_positive, default=default.steps, help="optimiser steps in all")
    p.add_argument("--batch-size", metavar="N", type=parse_positive, default=default.batch_size, help="images a step")
    p.add_argument("--lr", metavar="X", type=float, default=default.lr, help="peak learning rate of Adam")
    p.add_argument("--warmup", metavar="N", type=int, default=default.warmup, help="steps of linear warm-up")
    p.add_argument("--lr-schedule", choices=("constant", "cosine"), default=default.lr_schedule, help="after the warm-up")
    p.add_argument("--ema", metavar="X", type=float, default=default.ema, help="decay of the averaged weights")
    p.add_argument("--ema-snapshots", metavar="N", type=parse_positive, help=_SNAPSHOTS_HELP)
    p.add_argument("--grad-clip", metavar="X", type=float, default=default.grad_clip, help="largest gradient norm")
    p.add_argument("--dropout", metavar="X", type=float, help="dropout in the residual blocks (default: the preset's)")
    p.add_argument("--prediction-type", choices=PREDICTION_TYPES, help="what the network predicts (default: the preset's)")
    p.add_argument("--min-snr-gamma", metavar="X", type=float, help="min-SNR weighting; its authors: 5 (default: unweighted)")
    p.add_argument(
        "--label-dropout",
        metavar="X",
        type=float,
        default=default.label_dropout,
        help="share of labels dropped, for guidance",
    )
    p.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the data, left to right (default: images, not sounds)",
    )
    dtype = p.add_argument(
        "--dtype",
        choices=("auto", *_PRECISIONS.values()),
        default="auto",
        help="what the network computes in; auto: bfloat16, by autocast, where the device is fast at it, otherwise float32",
    )
    p.add_former_name("--precision", dtype, {"auto": "auto", **_PRECISIONS})
    p.add_argument("--compile", action="store_true", help="compile the training step with torch.compile")
    p.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    p.add_argument("--seed", metavar="N", type=_seed, default=default.seed, help="of weights, order, noise and dropout")
    p.add_argument("--log-every", metavar="N", type=parse_positive, default=50, help="steps between lines of stats.jsonl")
    p.add_argument("--save-every", metavar="N", type=parse_positive, default=1000, help="steps between checkpoints")
    p.add_argument("--sample-every", metavar="N", type=parse_positive, default=1000, help="steps between sample grids")
    p.add_argument("--minutes", metavar="M", type=_minutes, help="stop after so many, with a checkpoint to --resume from")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def _absolute(text: str) -> str:
    """What is here and would be something else, or nothing, from another working directory."""
    return os.path.abspath(text) if os.path.exists(text) or glob.glob(text) else text


def _model(text: str) -> str:
    return text if text in packaged_models() else _absolute(text)


def _seed(text: str) -> int:
    if text.isdecimal() and int(text) < 2**63:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"a positive number of minutes; got {text!r}")


_INIT_HELP = (
    "begin with the network and the weights of this model (as --model of ddim_fast.sample), instead of with a preset's and "
    "random ones. For data without labels a class-conditional one loses its classes and keeps its null class; for images twice "
    "as large (--set sample_size=64 where the model's is 32) it gets one more level around it"
)
_SNAPSHOTS_HELP = (
    "steps between snapshots in OUT/ema, from which ddim_fast.export --ema-length makes averages of any length afterwards "
    "(default: none)"
)
_LATENTS_HELP = (
    "train on the latents of the autoencoder in this folder, an earlier run's or one saved by diffusers, of which the "
    "checkpoint gets a copy; size and channels of the preset are then the latents'"
)


def _recipe_help() -> str:
    fast = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in _RECIPES["fast"].items())
    return f"defaults of the options below: ddpm, those of the papers, or fast, for shorter runs: {fast}"


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    with parser.usage_errors():
        start = None if settings.init is None else _start(parser, settings)
        audio = AudioConfig.preset(settings.preset) if start is None else start.audio
        flip = audio is None if settings.flip is None else settings.flip
        settings = dataclasses.replace(settings, flip=flip, latents=_latents(settings))
        device = pick_device(settings.device)
        options = _options(settings, device)
        if settings.latents is not None and settings.preset == AUTOENCODER:
            raise ValueError("--latents is for training a network on latents; --preset autoencoder makes the autoencoder")
    torch.manual_seed(options.seed)
    try:
        if settings.preset == AUTOENCODER:
            trainer, codec, seen = _autoencoder_trainer(parser, settings, device, options)
        else:
            trainer, codec, seen = _unet_trainer(parser, settings, device, options, start)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} ({parser.hint})" if settings.resume else error) from None
    out = settings.out
    if _goes_on(settings):
        trainer.load(out)
    out.mkdir(parents=True, exist_ok=True)
    seen.save(out)
    write_json(out / RUN, {name: value for name, value in vars(settings).items() if name not in _PER_CALL})
    if codec is not None:
        codec.autoencoder.save_pretrained(out / AUTOENCODER)
    stopped = run_training(
        trainer,
        out,
        functools.partial(_save_grid, trainer, codec),
        log_every=settings.log_every,
        save_every=settings.save_every,
        sample_every=settings.sample_every,
        minutes=settings.minutes,
        quiet=settings.quiet,
    )
    if stopped:
        print(
            f"stopped: {out} holds a checkpoint of step {trainer.step}; the same command with --resume goes on", file=sys.stderr
        )
        raise KeyboardInterrupt
    if isinstance(trainer.model, Autoencoder):
        print(f"trained to step {trainer.step}; train on its latents with: python -m ddim_fast.train --latents {out}")
    else:
        print(f"trained to step {trainer.step}; sample with: python -m ddim_fast.sample --model {out}")


@dataclass(frozen=True)
class Settings:
    """What the options say; those of a run that goes on, where they are not given again."""

    data: str
    convert: bool
    preset: str
    init: str | None
    latents: str | None
    set: list[str]
    recipe: str
    class_conditional: bool
    out: Path
    resume: bool
    steps: int
    batch_size: int
    lr: float
    warmup: int
    lr_schedule: str
    ema: float
    ema_snapshots: int | None
    grad_clip: float
    dropout: float | None
    prediction_type: str | None
    min_snr_gamma: float | None
    label_dropout: float
    flip: bool | None
    dtype: str
    compile: bool
    device: str
    seed: int
    log_every: int
    save_every: int
    sample_every: int
    minutes: float | None
    quiet: bool


def _settings(parser: CommandParser) -> Settings:
    """The settings of a run that may begin or go on in ``--out``; otherwise a usage error."""
    # These decide the defaults of the others.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = parser.error
    first.add_argument("--out", type=Path, default=Path())
    first.add_argument("--resume", action="store_true")
    first.add_argument("--recipe", default="ddpm")
    given = first.parse_known_args()[0]
    record = given.out / RUN
    stored = _stored(parser, record) if given.resume and record.is_file() else {}
    parser.set_defaults(**(stored if given.resume else _RECIPES.get(given.recipe, {})))
    settings = Settings(**vars(parser.parse_args()))
    out = settings.out
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("training is one process; start it without torchrun")
    if settings.resume:
        if not record.is_file():
            parser.error(f"--resume: there is no run in {out}")
        if _holds_checkpoint(out) and not (out / TRAINING_STATE).is_file():
            parser.error(
                f"--resume: {out} has a checkpoint, but no {TRAINING_STATE} to go on from; --init {out} "
                "begins another run, in another --out, with its weights"
            )
        parser.hint = f"options that are not given are those of {record}"
        if given.recipe not in ("ddpm", stored.get("recipe")):
            parser.error(f"--recipe {given.recipe}: a run goes on with its own; begin another with another --out")
        if settings.latents != stored.get("latents"):
            parser.error(f"--latents {settings.latents}: a run goes on with its own; begin another with another --out")
    elif record.exists():
        parser.error(f"--out {out} holds a run already; go on with --resume or choose another folder")
    elif _holds_checkpoint(out):
        parser.error(f"--out {out} holds a checkpoint already, which is no run's; choose another folder")
    if settings.data is None:
        parser.error("--data is required")
    return settings


def _stored(parser: CommandParser, record: Path) -> dict[str, Any]:
    """The options that a run was begun with."""

    def update(values: dict[str, Any]) -> None:
        if "precision" in values:
            former = values.pop("precision")
            values["dtype"] = _PRECISIONS.get(former, former)

    known = {field.name for field in dataclasses.fields(Settings)} - set(_PER_CALL)
    return stored_options(parser, record, ["--out", str(record.parent)], known, update)


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model_index.json", "model.safetensors", TRAINING_STATE))


def _goes_on(settings: Settings) -> bool:
    """Whether there is a checkpoint to go on from; a run can end before its first one, and then starts over."""
    return settings.resume and (settings.out / TRAINING_STATE).is_file()


def _check_same_network(parser: CommandParser, settings: Settings, config: UNetConfig | AutoencoderConfig) -> None:
    """A usage error where the options describe another network than that of the run that goes on; dropout has no weights."""
    if not _goes_on(settings):
        return
    own = load_config(settings.out, type(config)).to_dict()
    for name, value in config.to_dict().items():
        if name != "dropout" and own.get(name) != value:
            parser.error(
                f"--resume: the network of this run has {name} {own.get(name)}, not {value}; train another in another --out"
            )


def _check_same_data(parser: CommandParser, settings: Settings, now: DataRecord) -> None:
    """A usage error where a run that goes on would lose images or mistake their classes; a line where it gets more images."""
    before = DataRecord.load(settings.out) if _goes_on(settings) else None
    if before is None:
        return
    try:
        added = before.added(now)
    except ValueError as error:
        parser.error(
            f"--resume: {error}; bring the data back, name it by --data, or remove {settings.out / DATA_RECORD} to go on with "
            "the data as it is"
        )
    if added:
        print(f"{now.path} holds {now.images} images, {added} more than before: the run goes on with all", file=sys.stderr)


def _start(parser: CommandParser, settings: Settings) -> UNet:
    """The model that ``--init`` names, with one more level where its images are to be twice as large; of a run that goes on,
    its own."""
    fields = _set_fields(settings)
    for name in ("preset", "class_conditional", "prediction_type", "latents"):
        if getattr(settings, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} describes a network, and --init {settings.init} is one")
    for name in fields.keys() - {"sample_size"}:
        raise ValueError(f"--set {name} describes a network, and --init {settings.init} is one; only its sample_size can grow")
    model = UNet.from_pretrained(_start_folder(settings))
    own = model.config.sample_size
    size = fields.get("sample_size", own)
    if size == own:
        return model
    if size != 2 * own or model.audio is not None or _latents(settings) is not None:
        raise ValueError(
            f"--set sample_size: --init {settings.init} has {own}, which can stay, or double where its images are pictures; "
            f"got {size}"
        )
    torch.manual_seed(settings.seed)
    return enclose(model)


def _start_folder(settings: Settings) -> Path:
    begun = settings.resume and (settings.out / "config.json").is_file()  # not before its first checkpoint
    return settings.out if begun else local_model(settings.init)


def _latents(settings: Settings) -> str | None:
    """The folder of the autoencoder: the one named, or that of the model that ``--init`` names."""
    if settings.init is not None and (_start_folder(settings) / AUTOENCODER).is_dir():
        return str(_start_folder(settings) / AUTOENCODER)
    return settings.latents


def _autoencoder_trainer(
    parser: CommandParser, settings: Settings, device: torch.device, options: TrainingOptions
) -> tuple[Trainer, None, DataRecord]:
    with parser.usage_errors():
        if settings.class_conditional:
            raise ValueError("--class-conditional is for diffusion models, not for an autoencoder")
        if options.ema_snapshots is not None:
            raise ValueError("--ema-snapshots is for diffusion models, not for an autoencoder")
        for name in ("dropout", "prediction_type", "min_snr_gamma"):
            if getattr(settings, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} is for diffusion models, not for an autoencoder")
        config = AutoencoderConfig.from_dict({"sample_size": 64, **_set_fields(settings)})
    _check_same_network(parser, settings, config)
    data = load_images(settings.data, config.in_channels, config.sample_size, labelled=False)
    seen = DataRecord.of(settings.data, data)
    _check_same_data(parser, settings, seen)
    return Trainer(Autoencoder(config).to(device), data, options), None, seen


def _unet_trainer(
    parser: CommandParser,
    settings: Settings,
    device: torch.device,
    options: TrainingOptions,
    start: UNet | None,
) -> tuple[Trainer, LatentCodec | None, DataRecord]:
    """What trains a U-Net, which may have been trained before, the autoencoder whose latents it learns, if it does, and the
    record of its data."""
    codec = None
    with parser.usage_errors():
        overrides = _overrides(settings) if start is None else {}
        if settings.latents is not None:
            copied = settings.out / AUTOENCODER
            codec = LatentCodec(load_autoencoder(copied if copied.is_dir() else Path(settings.latents)).to(device))
            image_shape, latent_shape = latent_space(codec, overrides.get("sample_size"))
            overrides |= {"in_channels": latent_shape[0], "sample_size": latent_shape[1]}
        if start is None:
            config, audio = UNetConfig.preset(settings.preset, **overrides), AudioConfig.preset(settings.preset)
        else:
            dropout = start.config.dropout if settings.dropout is None else settings.dropout
            config, audio = dataclasses.replace(start.config, dropout=dropout), start.audio
    weights = None if start is None else start.state_dict()
    labelled = settings.class_conditional or config.num_classes is not None
    data, audio = _load(settings, config.image_shape if codec is None else image_shape, audio, labelled)
    if labelled and data.labels is None:
        if start is None:
            parser.error(f"--class-conditional: {settings.data} has no label for every image")
        print(f"{settings.data} has no label for every image: --init {settings.init} goes on without classes", file=sys.stderr)
        config, weights = fold_class(config, weights, None)
        audio = None if audio is None else dataclasses.replace(audio, labels=None)
    if settings.class_conditional:
        config = dataclasses.replace(config, num_classes=config.num_classes or int(data.labels.max()) + 1)
    seen = DataRecord.of(settings.data, data, None if audio is None else audio.labels)
    _check_same_data(parser, settings, seen)
    _check_same_network(parser, settings, config)
    if codec is not None:
        data, options = encoded(data, codec, options.flip), dataclasses.replace(options, flip=False)
    model = UNet(config)
    with parser.usage_errors():
        _grid_sampler(model)  # what cannot be sampled is not worth training
    if weights is not None:
        model.load_state_dict(weights)
    model.audio = audio
    return Trainer(model.to(device), data, options), codec, seen


def _load(
    settings: Settings, image_shape: tuple[int, int, int], audio: AudioConfig | None, labelled: bool
) -> tuple[ImageSet, AudioConfig | None]:
    """The data, and what its images mean where the network is one of sounds."""
    if audio is None:
        return load_images(settings.data, *image_shape[:2], labelled=labelled), None
    from .data.sounds import load_sound_images

    return load_sound_images(settings.data, audio, labelled=labelled, convert=settings.convert)


def _save_grid(trainer: Trainer, codec: LatentCodec | None, path: Path) -> None:
    """Forty images of the averaged weights, the same seeds each time, so that a folder of them shows the progress. Of an
    autoencoder, the first images of the data above what it makes of them."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(trainer.model, Autoencoder):
        originals = to_unit_range(trainer.data.images[:10])
        averaged = LatentCodec(trainer.averaged_model())
        both = torch.cat([originals, averaged.decode(averaged.encode(originals))])
        save_image(path, image_grid(both, columns=len(originals)))
        return
    seeds, num_classes = range(40), trainer.model.config.num_classes
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    sampler = _grid_sampler(trainer.averaged_model())
    if codec is not None:
        sampler = LatentSampler(sampler, codec.autoencoder)
    images = sampler.sample(seeds=seeds, labels=labels, batch_size=20)
    save_image(path, image_grid(medium_of(sampler).shown(images)))


def _grid_sampler(model: UNet) -> Sampler:
    return Sampler(model, steps=min(20, model.config.num_train_timesteps))


def _options(settings: Settings, device: torch.device) -> TrainingOptions:
    fields = {f.name for f in dataclasses.fields(TrainingOptions)} - {"bf16"}
    bf16 = bf16_is_fast(device) if settings.dtype == "auto" else settings.dtype == "bfloat16"
    options = TrainingOptions(bf16=bf16, **{name: getattr(settings, name) for name in fields})
    problem = why_not_compiled(device) if options.compile else None
    if problem is None:
        return options
    print(f"--compile: torch.compile does not work here, so the training step is not compiled: {problem}", file=sys.stderr)
    return dataclasses.replace(options, compile=False)


def _overrides(settings: Settings) -> dict[str, Any]:
    """The fields of a U-Net's configuration that options change."""
    fields = _set_fields(settings)
    for name in ("dropout", "prediction_type"):
        if getattr(settings, name) is not None:
            fields.setdefault(name, getattr(settings, name))  # a recipe's, where --set does not say another
    return fields


def _set_fields(settings: Settings) -> dict[str, Any]:
    """What ``--set`` says."""
    fields: dict[str, Any] = {}
    for item in settings.set:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE; got {item!r}")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    return fields


if __name__ == "__main__":
    run_command(main)
