"""Train a diffusion U-Net: ``python -m ddim_fast.train --data DATA --preset NAME --out DIR``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .cli.modality import medium_of
from .cli.options import CONVERT_HELP
from .cli.parser import CommandParser, parse_positive, run_command
from .data.images import ImageSet, load_images, to_unit_range
from .data.latents import encoded, latent_space
from .data.record import DATA_RECORD, DataRecord
from .diffusion.latent import LatentCodec, LatentSampler
from .diffusion.sampler import Sampler
from .engine import why_not_compiled
from .interop.autoencoder import load_autoencoder
from .io.files import atomic_write
from .io.pictures import image_grid, save_image
from .io.records import RUN, SAMPLES, STATS
from .models.audio import AudioConfig
from .models.autoencoder import Autoencoder
from .models.checkpoint import AUTOENCODER, SNAPSHOTS, load_config, local_model, packaged_models
from .models.config import PREDICTION_TYPES, AutoencoderConfig, UNetConfig, preset_names
from .models.formats.diffusers import fold_class
from .models.growth import enclose
from .models.unet import UNet
from .ops.devices import bf16_is_fast, pick_device
from .training.averages import snapshots
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
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("training is one process; start it without torchrun")
    recipe = arguments.recipe
    record = arguments.out / RUN
    if arguments.resume:
        if not record.is_file():
            parser.error(f"--resume: there is no run in {arguments.out}")
        if _holds_checkpoint(arguments.out) and not (arguments.out / TRAINING_STATE).is_file():
            parser.error(
                f"--resume: {arguments.out} has a checkpoint, but no {TRAINING_STATE} to go on from; --init {arguments.out} "
                "begins another run, in another --out, with its weights"
            )
        begun = _begun(parser, record, arguments)
        parser.set_defaults(**begun)
        parser.hint = f"options that are not given are those of {record}"
        arguments = parser.parse_args()
        if recipe != "ddpm" and recipe != begun.get("recipe"):
            parser.error(f"--recipe {recipe}: a run goes on with its own; begin another with another --out")
        if arguments.latents != begun.get("latents"):
            parser.error(f"--latents {arguments.latents}: a run goes on with its own; begin another with another --out")
    elif record.exists():
        parser.error(f"--out {arguments.out} holds a run already; go on with --resume or choose another folder")
    elif _holds_checkpoint(arguments.out):
        parser.error(f"--out {arguments.out} holds a checkpoint already, which is no run's; choose another folder")
    else:
        parser.set_defaults(**_RECIPES[recipe])
        arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("--data is required")

    with parser.usage_errors():
        start = None if arguments.init is None else _start(parser, arguments)
        if arguments.flip is None:
            arguments.flip = (AudioConfig.preset(arguments.preset) if start is None else start.audio) is None
        device = pick_device(arguments.device)
        options = _options(arguments, device)
        if arguments.latents is not None and arguments.preset == AUTOENCODER:
            raise ValueError("--latents is for training a network on latents; --preset autoencoder makes the autoencoder")
    torch.manual_seed(options.seed)
    try:
        if arguments.preset == AUTOENCODER:
            trainer, codec, seen = _autoencoder_trainer(parser, arguments, device, options)
        else:
            trainer, codec, seen = _unet_trainer(parser, arguments, device, options, start)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} ({parser.hint})" if arguments.resume else error) from None
    if _goes_on(arguments):
        trainer.load(arguments.out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seen.save(arguments.out)
    remembered = {k: v for k, v in vars(arguments).items() if k not in _PER_CALL}
    atomic_write(record, (json.dumps(remembered, indent=2) + "\n").encode())
    if codec is not None:
        codec.autoencoder.save_pretrained(arguments.out / AUTOENCODER)
    _train(trainer, arguments, codec)


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model_index.json", "model.safetensors", TRAINING_STATE))


def _goes_on(arguments: argparse.Namespace) -> bool:
    """Whether there is a checkpoint to go on from; a run can end before its first one, and then starts over."""
    return arguments.resume and (arguments.out / TRAINING_STATE).is_file()


def _begun(parser: CommandParser, record: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that a run was begun with.

    Raises:
        ValueError: its record is damaged, or has other options than this version.
    """
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        if "precision" in values:  # of the version before
            former = values.pop("precision")
            values["dtype"] = _PRECISIONS.get(former, former)
        words = [word for name, value in values.items() for word in _words(name, value)]
        unknown = sorted(values.keys() - (vars(arguments).keys() - set(_PER_CALL)))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{record}: not the record of a run ({error})") from None
    if unknown:
        raise ValueError(f"{record}: not the record of a run (there is no option {unknown[0]!r})")
    parser.hint = f"as {record} says"
    own = vars(parser.parse_args([*words, "--out", str(arguments.out)]))
    return {name: own[name] for name in values}


def _words(name: str, value: Any) -> list[str]:
    """An option and its value as they stand in a command."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else ["--no-flip"] if name == "flip" else []
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [option, *value] if value else []
    if value is None or isinstance(value, (str, int, float)):
        return [] if value is None else [f"{option}={value}"]
    raise TypeError(f"{name} is {value!r}")


def _check_same_network(parser: CommandParser, arguments: argparse.Namespace, config: UNetConfig | AutoencoderConfig) -> None:
    """A usage error where the options describe another network than that of the run that goes on; dropout has no weights."""
    if not _goes_on(arguments):
        return
    own = load_config(arguments.out, type(config)).to_dict()
    for name, value in config.to_dict().items():
        if name != "dropout" and own.get(name) != value:
            parser.error(
                f"--resume: the network of this run has {name} {own.get(name)}, not {value}; train another in another --out"
            )


def _check_same_data(parser: CommandParser, arguments: argparse.Namespace, now: DataRecord) -> None:
    """A usage error where a run that goes on would lose images or mistake their classes; a line where it gets more images."""
    before = DataRecord.load(arguments.out) if _goes_on(arguments) else None
    if before is None:
        return
    try:
        added = before.added(now)
    except ValueError as error:
        parser.error(
            f"--resume: {error}; bring the data back, name it by --data, or remove {arguments.out / DATA_RECORD} to go on with "
            "the data as it is"
        )
    if added:
        print(f"{now.path} holds {now.images} images, {added} more than before: the run goes on with all", file=sys.stderr)


def _start(parser: CommandParser, arguments: argparse.Namespace) -> UNet:
    """The model that ``--init`` names, with one more level where its images are to be twice as large; of a run that goes on,
    its own."""
    fields = _set_fields(arguments)
    for name in ("preset", "class_conditional", "prediction_type", "latents"):
        if getattr(arguments, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} describes a network, and --init {arguments.init} is one")
    for name in fields.keys() - {"sample_size"}:
        raise ValueError(f"--set {name} describes a network, and --init {arguments.init} is one; only its sample_size can grow")
    begun = arguments.resume and (arguments.out / "config.json").is_file()  # not before its first checkpoint
    folder = arguments.out if begun else local_model(arguments.init)
    if (folder / AUTOENCODER).is_dir():
        arguments.latents = str(folder / AUTOENCODER)
    model = UNet.from_pretrained(folder)
    own = model.config.sample_size
    size = fields.get("sample_size", own)
    if size == own:
        return model
    if size != 2 * own or model.audio is not None or arguments.latents is not None:
        raise ValueError(
            f"--set sample_size: --init {arguments.init} has {own}, which can stay, or double where its images are pictures; "
            f"got {size}"
        )
    torch.manual_seed(arguments.seed)
    return enclose(model)


def _autoencoder_trainer(
    parser: CommandParser, arguments: argparse.Namespace, device: torch.device, options: TrainingOptions
) -> tuple[Trainer, None, DataRecord]:
    with parser.usage_errors():
        if arguments.class_conditional:
            raise ValueError("--class-conditional is for diffusion models, not for an autoencoder")
        if options.ema_snapshots is not None:
            raise ValueError("--ema-snapshots is for diffusion models, not for an autoencoder")
        for name in ("dropout", "prediction_type", "min_snr_gamma"):
            if getattr(arguments, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} is for diffusion models, not for an autoencoder")
        config = AutoencoderConfig.from_dict({"sample_size": 64, **_set_fields(arguments)})
    _check_same_network(parser, arguments, config)
    data = load_images(arguments.data, config.in_channels, config.sample_size, labelled=False)
    seen = DataRecord.of(arguments.data, data)
    _check_same_data(parser, arguments, seen)
    return Trainer(Autoencoder(config).to(device), data, options), None, seen


def _unet_trainer(
    parser: CommandParser,
    arguments: argparse.Namespace,
    device: torch.device,
    options: TrainingOptions,
    start: UNet | None,
) -> tuple[Trainer, LatentCodec | None, DataRecord]:
    """What trains a U-Net, which may have been trained before, the autoencoder whose latents it learns, if it does, and the
    record of its data."""
    codec = None
    with parser.usage_errors():
        overrides = _overrides(arguments) if start is None else {}
        if arguments.latents is not None:
            copied = arguments.out / AUTOENCODER
            codec = LatentCodec(load_autoencoder(copied if copied.is_dir() else Path(arguments.latents)).to(device))
            image_shape, latent_shape = latent_space(codec, overrides.get("sample_size"))
            overrides |= {"in_channels": latent_shape[0], "sample_size": latent_shape[1]}
        if start is None:
            config, audio = UNetConfig.preset(arguments.preset, **overrides), AudioConfig.preset(arguments.preset)
        else:
            dropout = start.config.dropout if arguments.dropout is None else arguments.dropout
            config, audio = dataclasses.replace(start.config, dropout=dropout), start.audio
    weights = None if start is None else start.state_dict()
    labelled = arguments.class_conditional or config.num_classes is not None
    data, audio = _load(arguments, config.image_shape if codec is None else image_shape, audio, labelled)
    if labelled and data.labels is None:
        if start is None:
            parser.error(f"--class-conditional: {arguments.data} has no label for every image")
        print(
            f"{arguments.data} has no label for every image: --init {arguments.init} goes on without classes", file=sys.stderr
        )
        config, weights = fold_class(config, weights, None)
        audio = None if audio is None else dataclasses.replace(audio, labels=None)
    if arguments.class_conditional:
        config = dataclasses.replace(config, num_classes=config.num_classes or int(data.labels.max()) + 1)
    seen = DataRecord.of(arguments.data, data, None if audio is None else audio.labels)
    _check_same_data(parser, arguments, seen)
    _check_same_network(parser, arguments, config)
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
    arguments: argparse.Namespace, image_shape: tuple[int, int, int], audio: AudioConfig | None, labelled: bool
) -> tuple[ImageSet, AudioConfig | None]:
    """The data, and what its images mean where the network is one of sounds."""
    if audio is None:
        return load_images(arguments.data, *image_shape[:2], labelled=labelled), None
    from .data.sounds import load_sound_images

    return load_sound_images(arguments.data, audio, labelled=labelled, convert=arguments.convert)


def _train(trainer: Trainer, arguments: argparse.Namespace, codec: LatentCodec | None) -> None:
    """Run the loop: progress bar, stats.jsonl, checkpoints, sample grids."""
    out, options = arguments.out, trainer.options
    _forget_after(out, trainer.step)
    total = torch.zeros((), device=trainer.model.device)
    logged, saved, since = trainer.step, trainer.step, time.perf_counter()
    deadline = since + 60 * (arguments.minutes or math.inf)
    with (
        _interruptible() as interrupted,
        open(out / STATS, "a", encoding="utf-8") as stats,
        tqdm(total=options.steps, initial=trainer.step, unit="step", disable=arguments.quiet, file=sys.stderr) as bar,
    ):
        for step in trainer.run():
            total += step.loss
            bar.update()
            last = step.step == options.steps or time.perf_counter() > deadline or interrupted()
            if last or step.step % arguments.log_every == 0 or step.step % arguments.save_every == 0:
                loss, grad_norm = total.item() / (step.step - logged), step.grad_norm.item()
                # The gradient of the last step is in the weights already, and not in a loss yet.
                for what, value in (("loss", loss), ("gradient's norm", grad_norm)):
                    if not math.isfinite(value):
                        kept = f"{out} keeps the checkpoint of step {saved}" if saved else "there is no checkpoint yet"
                        raise ValueError(
                            f"the {what} became {value} by step {step.step}; lower --lr, or use --dtype float32 ({kept})"
                        )
                now = time.perf_counter()
                rate = (step.step - logged) * options.batch_size / (now - since)
                line = {
                    "step": step.step,
                    "loss": loss,
                    "grad_norm": grad_norm,
                    "lr": step.lr,
                    "images_per_s": rate,
                    "time": time.time(),
                }
                stats.write(json.dumps(line) + "\n")
                stats.flush()
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s")
                total.zero_()
                logged, since = step.step, now
            if options.ema_snapshots is not None and (last or step.step % options.ema_snapshots == 0):
                trainer.write_snapshot(out / SNAPSHOTS)
            if last or step.step % arguments.save_every == 0:
                trainer.save(out)
                saved = step.step
            if last or step.step % arguments.sample_every == 0:
                _save_grid(trainer, codec, out / SAMPLES / f"{step.step:07d}.png")
            if last:
                break
    if interrupted():
        print(
            f"stopped: {out} holds a checkpoint of step {trainer.step}; the same command with --resume goes on", file=sys.stderr
        )
        raise KeyboardInterrupt
    if isinstance(trainer.model, Autoencoder):
        print(f"trained to step {trainer.step}; train on its latents with: python -m ddim_fast.train --latents {out}")
    else:
        print(f"trained to step {trainer.step}; sample with: python -m ddim_fast.sample --model {out}")


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C does not interrupt the step that is being made, half of whose weights could be new: it is remembered. A
    second one does.

    Yields:
        Whether it came.
    """
    came: list[int] = []

    def remember(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


def _forget_after(out: Path, step: int) -> None:
    """Drop the lines and the snapshots of steps that are about to be made again, because the run stopped after its last
    checkpoint; and lines that are none, as one that was not written to its end."""
    path, kept = out / STATS, []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line.decode())["step"] <= step:
                kept.append(line + b"\n")
    if path.exists():
        atomic_write(path, b"".join(kept))
    for steps, snapshot in snapshots(out / SNAPSHOTS).items():
        if steps > step:
            snapshot.unlink()


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


def _options(arguments: argparse.Namespace, device: torch.device) -> TrainingOptions:
    fields = {f.name for f in dataclasses.fields(TrainingOptions)} - {"bf16"}
    bf16 = bf16_is_fast(device) if arguments.dtype == "auto" else arguments.dtype == "bfloat16"
    options = TrainingOptions(bf16=bf16, **{name: getattr(arguments, name) for name in fields})
    problem = why_not_compiled(device) if options.compile else None
    if problem is None:
        return options
    print(f"--compile: torch.compile does not work here, so the training step is not compiled: {problem}", file=sys.stderr)
    return dataclasses.replace(options, compile=False)


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a U-Net's configuration that options change."""
    fields = _set_fields(arguments)
    for name in ("dropout", "prediction_type"):
        if getattr(arguments, name) is not None:
            fields.setdefault(name, getattr(arguments, name))  # a recipe's, where --set does not say another
    return fields


def _set_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` says."""
    fields: dict[str, Any] = {}
    for item in arguments.set:
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
