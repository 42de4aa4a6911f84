"""The network, data, trainer and sample grids that the options of train describe."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.collected import left_out_line
from ..data.images import ImageSet, load_images, to_unit_range
from ..data.latents import encoded, latent_space
from ..data.record import DATA_RECORD, DataRecord
from ..diffusion.latent import LatentCodec, LatentSampler
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.timesteps import select_timesteps
from ..engine import why_not_compiled
from ..interop.autoencoder import load_autoencoder
from ..io.pictures import image_grid, save_image
from ..io.processes import Processes
from ..models.audio import AudioConfig
from ..models.autoencoder import Autoencoder
from ..models.checkpoint import AUTOENCODER, load_config, local_model
from ..models.config import ADVICE, AutoencoderConfig, UNetConfig
from ..models.formats.diffusers import fold_class
from ..models.growth import enclose
from ..models.unet import UNet
from ..ops.devices import bf16_is_fast, pick_device
from ..training.loop import Trainer
from ..training.options import TRAINING_STATE, TrainingOptions
from .modality import medium_of
from .parser import CommandParser
from .progress import count_of, describe_model, notice
from .settings import TrainSettings

if TYPE_CHECKING:
    from .samplers import AnySampler

__all__ = ["describe_run", "find_device", "find_start", "make_trainer", "save_grid"]


def _goes_on(settings: TrainSettings) -> bool:
    """Whether a resumed run has a checkpoint, whose config.json is written last; a run that ended before its first one starts
    over."""
    return settings.resume and all((settings.out / name).is_file() for name in (TRAINING_STATE, "config.json"))


def _check_same_network(parser: CommandParser, settings: TrainSettings, config: UNetConfig | AutoencoderConfig) -> None:
    """A usage error where the options describe another network than the resumed run's. Dropout and the fields for people may
    differ: they have no weights."""
    if not _goes_on(settings):
        return
    own = load_config(settings.out, type(config)).to_dict()
    for name, value in config.to_dict().items():
        if name not in ("dropout", *ADVICE) and own.get(name) != value:
            parser.error(
                f"--resume: the network of this run has {name} {own.get(name)}, not {value}; train another in another --out"
            )


def _check_same_data(parser: CommandParser, settings: TrainSettings, now: DataRecord) -> None:
    """A usage error where a resumed run would lose images or mistake their classes; a line where it gets more images."""
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
        there = count_of(now.images, "images")
        print(f"{now.path} holds {there}, {added} more than before: the run continues with all of them", file=sys.stderr)


def find_device(parser: CommandParser, settings: TrainSettings, processes: Processes) -> torch.device:
    """The device of this process, made ready for it."""
    with parser.usage_errors():
        device = pick_device(processes.device_name(settings.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        processes.share_cores()
    return device


def find_start(parser: CommandParser, settings: TrainSettings) -> tuple[TrainSettings, UNet | None]:
    """The settings, completed with those that depend on the model, and the model of ``--init``."""
    start = None if settings.init is None else _load_start(parser, settings)
    with parser.usage_errors():
        audio = AudioConfig.preset(settings.preset) if start is None else start.audio
        flip = audio is None if settings.flip is None else settings.flip
        return dataclasses.replace(settings, flip=flip, latents=_latents(settings)), start


def _load_start(parser: CommandParser, settings: TrainSettings) -> UNet:
    """The model of ``--init``, with one more level where ``--set sample_size`` doubles its images; for a resumed run, the run's
    own."""
    with parser.usage_errors():
        fields = _set_fields(settings)
        for name in ("preset", "class_conditional", "prediction_type", "latents"):
            if getattr(settings, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} describes a network, and --init {settings.init} is one")
        for name in sorted(fields.keys() - {"sample_size"}):
            raise ValueError(
                f"--set {name} describes a network, and --init {settings.init} is one; only its sample_size can grow"
            )
        folder = _start_folder(settings)
    return _grown(parser, settings, folder)


def _grown(parser: CommandParser, settings: TrainSettings, folder: Path) -> UNet:
    """The model in a folder, for images of the size that is asked for."""
    model = UNet.from_pretrained(folder)  # a damaged model is not a usage error
    own = model.config.sample_size
    size = _set_fields(settings).get("sample_size", own)
    if size == own:
        return model
    if size != 2 * own or model.audio is not None or _latents(settings) is not None:
        parser.error(
            f"--set sample_size: --init {settings.init} has {own}, which can stay, or double for a model of pictures; got "
            f"{size}"
        )
    torch.manual_seed(settings.seed)
    return enclose(model)


def _start_folder(settings: TrainSettings) -> Path:
    begun = settings.resume and (settings.out / "config.json").is_file()  # it has no config.json before its first checkpoint
    if begun:
        return settings.out
    assert settings.init is not None  # the callers check
    return local_model(settings.init)


def _latents(settings: TrainSettings) -> str | None:
    """The folder of the autoencoder: the given one, or that of the ``--init`` model."""
    if settings.init is not None and (_start_folder(settings) / AUTOENCODER).is_dir():
        return str(_start_folder(settings) / AUTOENCODER)
    return settings.latents


def make_trainer(
    parser: CommandParser, settings: TrainSettings, start: UNet | None, device: torch.device, processes: Processes
) -> tuple[Trainer[Any], LatentCodec | None, DataRecord]:
    """The trainer, at a resumed run's last checkpoint; the autoencoder of a latent network, or None; and the record of the
    data.

    Args:
        settings, start: the results of :func:`find_start`.
        device: the result of :func:`find_device`.
        processes: those that share each batch.
    """
    with parser.usage_errors():
        options = _options(settings, device)
        if settings.latents is not None and settings.preset == AUTOENCODER:
            raise ValueError("--latents is for training a network on latents; --preset autoencoder makes the autoencoder")
    torch.manual_seed(options.seed)
    trainer: Trainer[Any]
    try:
        if settings.preset == AUTOENCODER:
            trainer, codec, seen = _autoencoder_trainer(parser, settings, device, options, processes)
        else:
            trainer, codec, seen = _unet_trainer(parser, settings, device, options, start, processes)
    except FileNotFoundError as error:
        if settings.resume:  # the run's stored data, not the user's option
            raise FileNotFoundError(f"{error} ({parser.hint})") from None
        parser.error(str(error))
    if _goes_on(settings):
        averaged = trainer.load(settings.out)
        if processes.is_first:
            trainer.mend(settings.out, averaged)
    return trainer, codec, seen


def _autoencoder_trainer(
    parser: CommandParser,
    settings: TrainSettings,
    device: torch.device,
    options: TrainingOptions,
    processes: Processes,
) -> tuple[Trainer[Autoencoder], None, DataRecord]:
    with parser.usage_errors():
        if settings.class_conditional:
            raise ValueError("--class-conditional is for diffusion models, not for an autoencoder")
        if options.ema_snapshots is not None:
            raise ValueError("--ema-snapshots is for diffusion models, not for an autoencoder")
        for name in ("consistency", "dropout", "optimizer", "prediction_type", "min_snr_gamma"):
            if getattr(settings, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} is for diffusion models, not for an autoencoder")
        config = AutoencoderConfig.from_dict({"sample_size": 64, **_set_fields(settings)})
    _check_same_network(parser, settings, config)
    with notice(f"reading {settings.data}", settings.quiet):
        shape = config.image_shape
        data = _load(settings, settings.data, shape, None, False, None)
        held_out = None if settings.val is None else _load(settings, settings.val, shape, None, False, None)
    seen = DataRecord.of(settings.data, data)
    _check_same_data(parser, settings, seen)
    return Trainer(Autoencoder(config).to(device), data, options, processes, held_out), None, seen


def _unet_trainer(
    parser: CommandParser,
    settings: TrainSettings,
    device: torch.device,
    options: TrainingOptions,
    start: UNet | None,
    processes: Processes,
) -> tuple[Trainer[UNet], LatentCodec | None, DataRecord]:
    codec = None
    with parser.usage_errors():
        if settings.consistency is not None:
            if start is None:
                raise ValueError("--consistency tunes a diffusion model; name it by --init")
            select_timesteps(NoiseSchedule.from_config(start.config), None, settings.consistency)  # before the data is read
        overrides = _overrides(settings) if start is None else {}
        if settings.latents is not None:
            copied = settings.out / AUTOENCODER
            codec = LatentCodec(load_autoencoder(copied if copied.is_dir() else Path(settings.latents)).to(device))
            image_shape, latent_shape = latent_space(codec, overrides.get("sample_size"))
            overrides |= {"in_channels": latent_shape[0], "sample_size": latent_shape[1]}
        if start is None:
            config, audio = UNetConfig.preset(settings.preset, **overrides), AudioConfig.preset(settings.preset)
        else:
            kept = 0.0 if settings.consistency is not None else start.config.dropout
            dropout = kept if settings.dropout is None else settings.dropout
            config, audio = dataclasses.replace(start.config, dropout=dropout), start.audio
    weights = None if start is None else start.state_dict()
    labelled = settings.class_conditional or config.num_classes is not None
    with notice(f"reading {settings.data}", settings.quiet):
        shape = config.image_shape if codec is None else image_shape
        data = _load(settings, settings.data, shape, audio, labelled, config.class_names)
    if labelled and data.labels is None:
        if start is None:
            parser.error(f"--class-conditional: {settings.data} has no label for every image")
        print(
            f"{settings.data} has no label for every image: --init {settings.init} continues without classes", file=sys.stderr
        )
        config, weights = fold_class(config, start.state_dict(), None)
    if settings.class_conditional:
        assert data.labels is not None  # data without labels has been refused
        config = dataclasses.replace(config, num_classes=config.num_classes or int(data.labels.max()) + 1)
    seen = DataRecord.of(settings.data, data)
    _check_same_data(parser, settings, seen)
    _check_same_network(parser, settings, config)
    config = _with_names(settings, config, data)
    held_out = None
    if settings.val is not None:
        with notice(f"reading {settings.val}", settings.quiet):
            names = config.class_names or data.class_names
            held_out = _load(settings, settings.val, shape, audio, config.num_classes is not None, names)
        if config.num_classes is not None and held_out.labels is None:
            parser.error(f"--val: {settings.val} has no label for every image; name images with the classes of --data")
    if codec is not None:
        with notice(f"encoding {len(data):,} images as latents", settings.quiet):
            held_out = None if held_out is None else encoded(held_out, codec, False)
            data, options = encoded(data, codec, options.flip), dataclasses.replace(options, flip=False)
    model = UNet(config)
    with parser.usage_errors():
        _grid_sampler(model, options)  # a network that cannot be sampled is refused before training
    if weights is not None:
        model.load_state_dict(weights)
    model.audio = audio
    teacher = None if settings.consistency is None else _teacher(parser, settings, config).to(device)
    return Trainer(model.to(device), data, options, processes, held_out, teacher), codec, seen


def _teacher(parser: CommandParser, settings: TrainSettings, config: UNetConfig) -> UNet:
    """The model of ``--init`` as it was when the run began, without classes where the run has none."""
    assert settings.init is not None  # it is refused before
    with parser.usage_errors():
        folder = local_model(settings.init)
    teacher = _grown(parser, settings, folder)
    if config.num_classes is None and teacher.config.num_classes is not None:
        folded, weights = fold_class(teacher.config, teacher.state_dict(), None)
        teacher = UNet(folded)
        teacher.load_state_dict(weights)
    return teacher


def _load(
    settings: TrainSettings,
    spec: str,
    image_shape: tuple[int, int, int],
    audio: AudioConfig | None,
    labelled: bool,
    class_names: tuple[str, ...] | None,
) -> ImageSet:
    """The data at ``spec``, with classes numbered as in the network that training starts from."""
    if audio is None:
        return load_images(
            spec, *image_shape[:2], labelled=labelled, class_names=class_names, max_bad=settings.max_bad, mapped=True
        )
    from ..data.sounds import load_sound_images

    return load_sound_images(
        spec, audio, labelled=labelled, class_names=class_names, convert=settings.convert, max_bad=settings.max_bad
    )


def _with_names(settings: TrainSettings, config: UNetConfig, data: ImageSet) -> UNetConfig:
    """The configuration with class names from ``--set``, the data, or the network that training starts from. A resumed run
    keeps the names in its config.json, which a user may have edited."""
    if config.num_classes is None:
        return config
    guidance, names = config.guidance, config.class_names
    if data.class_names is not None and (names is None or settings.init is not None):
        enough = len(data.class_names) >= config.num_classes
        names = data.class_names[: config.num_classes] if enough else None
    if _goes_on(settings):
        own: UNetConfig = load_config(settings.out)
        guidance, names = own.guidance or guidance, own.class_names or names
    return dataclasses.replace(config, guidance=guidance, class_names=names)


def describe_run(settings: TrainSettings, trainer: Trainer[Any], default_steps: bool) -> str:
    """The first lines of a run: network, data and number of steps.

    Args:
        default_steps: whether the number of steps is the device's default.
    """
    options, device = trainer.options, trainer.model.device
    network = f"preset {settings.preset}" if settings.init is None else settings.init
    dtype = "bfloat16 autocast" if options.bf16 else "float32"
    shape = "x".join(map(str, trainer.data.images.shape[1:]))
    steps = f"{options.steps:,}"
    if default_steps:
        steps += f", the default on a {'CPU' if device.type == 'cpu' else 'GPU'}; --steps N asks for another number"
    if trainer.step:
        steps += f", {trainer.step:,} of them done"
    elif options.steps <= options.warmup:
        steps += f"; all within the warm-up of {options.warmup:,}: use --recipe fast for short runs"
    lines = [trainer.data.resized, left_out_line(settings.data, trainer.data.left_out)]
    if settings.val is not None and trainer.held_out is not None:
        lines.append(left_out_line(settings.val, trainer.held_out.left_out))
    notes = "".join(f"{line}\n" for line in lines if line is not None)
    slices = trainer.processes.count * options.accumulate
    share = "" if slices == 1 else f" in {slices} slices of {options.batch_size // slices}"
    dropout = ""
    if slices > 1 and isinstance(trainer.model, UNet) and trainer.model.config.dropout:
        dropout = f"dropout: drawn for each slice, so the weights are those of {slices} slices; --dropout 0 gives one's\n"
    return (
        f"{describe_model(network, [trainer.model], dtype, device)}\n"
        f"data: {settings.data}, {len(trainer.data):,} images of {shape}, {options.batch_size} a step{share}\n"
        f"{notes}{dropout}steps: {steps}"
    )


def _grid_sampler(model: UNet, options: TrainingOptions) -> Sampler:
    """The sampler of a training's sample grids."""
    if options.consistency is not None:
        return Sampler(model, steps=None, spacing=options.consistency, solver="consistency")
    return Sampler(model, steps=min(20, model.config.num_train_timesteps))


def save_grid(trainer: Trainer[Any], codec: LatentCodec | None, averaged: Any, path: Path) -> None:
    """Write a grid of forty images from the averaged weights, with the same seeds each time to show the progress. An
    autoencoder's grid shows the first images of the data above their reconstructions."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(averaged, Autoencoder):
        originals, own_codec = to_unit_range(trainer.data.images[:10]), LatentCodec(averaged)
        both = torch.cat([originals, own_codec.decode(own_codec.encode(originals))])
        save_image(path, image_grid(both, columns=len(originals)))
        return
    seeds, num_classes = range(40), averaged.config.num_classes
    labels = None if num_classes is None else [seed % num_classes for seed in seeds]
    own = _grid_sampler(averaged, trainer.options)
    sampler: AnySampler = own if codec is None else LatentSampler(own, codec.autoencoder)
    images = sampler.sample(seeds=seeds, labels=labels, batch_size=20)
    save_image(path, image_grid(medium_of(sampler).shown(images)))


def _options(settings: TrainSettings, device: torch.device) -> TrainingOptions:
    fields = {f.name for f in dataclasses.fields(TrainingOptions)} - {"bf16"}
    bf16 = bf16_is_fast(device) if settings.dtype == "auto" else settings.dtype == "bfloat16"
    options = TrainingOptions(bf16=bf16, **{name: getattr(settings, name) for name in fields})
    problem = why_not_compiled(device) if options.compile else None
    if problem is None:
        return options
    print(f"--compile: torch.compile does not work here, so the training step is not compiled: {problem}", file=sys.stderr)
    return dataclasses.replace(options, compile=False)


def _overrides(settings: TrainSettings) -> dict[str, Any]:
    """The fields of a U-Net's configuration that options change."""
    fields = _set_fields(settings)
    for name in ("dropout", "prediction_type"):
        if getattr(settings, name) is not None:
            fields.setdefault(name, getattr(settings, name))  # a recipe's value; --set has priority
    return fields


def _set_fields(settings: TrainSettings) -> dict[str, Any]:
    """The fields that ``--set`` names, with their values."""
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
