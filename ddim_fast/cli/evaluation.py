"""The measures, images and samplers that the options of evaluate name."""

from __future__ import annotations

import functools
import hashlib
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..data.images import ImageSet, load_images
from ..data.resizing import Resizer
from ..diffusion.adaptive import fit_timesteps
from ..diffusion.denoiser import Denoiser
from ..diffusion.fitting import fit_solver
from ..diffusion.guidance import check_interval
from ..diffusion.sampler import Sampler
from ..diffusion.solvers import FITTED
from ..diffusion.timesteps import ADAPTIVE
from ..engine import select_engine
from ..evaluation.inception import FeatureNetwork, load_inception
from ..evaluation.measures import (
    SampleSet,
    Settings,
    exact_images,
    measure_loss,
    measure_pictures,
    measure_reconstruction,
    measure_samples,
    measure_trajectories,
)
from ..evaluation.pictures import describe, read_pictures, survey
from ..evaluation.reference import Reference, check_reference, load_reference
from ..evaluation.results import Results, machine
from ..evaluation.run import EvaluationRun
from ..evaluation.weights import default_weights, fetch_weights
from ..io.processes import Processes
from ..jobs.outputs import require_empty
from ..models.checkpoint import load_calibration, save_timesteps
from ..models.checksum import weights_checksum
from ..models.unet import UNet
from ..ops.devices import pick_device
from ..ops.serving import serving_line
from .options import class_record, seed_labels
from .parser import CommandParser
from .progress import count_of, describe_model, notice, say_resized
from .samplers import load_model, pixel_model, select_dtype, select_execution
from .settings import NUM_IMAGES, NUM_TRAJECTORIES, EvaluateSettings

__all__ = ["evaluate"]

# Calibration seeds must not be evaluated ones.
_CALIBRATION_SEEDS = range(2**61, 2**61 + 16)
_SOLVER_SEEDS = range(2**61, 2**61 + 96)


def evaluate(parser: CommandParser, arguments: EvaluateSettings, processes: Processes) -> None:
    """Check the settings, then measure those that the results lack."""
    with parser.usage_errors():
        device = pick_device(processes.device_name(arguments.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        processes.share_cores()
    if arguments.fetch_inception:
        with notice("downloading the feature network", arguments.quiet or not processes.is_first):
            processes.from_first(lambda: fetch_weights(default_weights()))
        if processes.is_first:
            print(f"wrote the feature network to {default_weights()}")
    measures = arguments.reference or arguments.trajectory_error or arguments.reconstruction or arguments.loss
    fits = arguments.fit_timesteps or arguments.fit_solver
    if not measures and not fits:
        return
    with parser.usage_errors():
        results = Results(arguments.out)
        if not results.rows:
            require_empty(arguments.out)
    run = {
        "command": shlex.join(["python", "-m", "ddim_fast.evaluate", *sys.argv[1:]]),
        "machine": machine(device),
        "processes": processes.count,
        "ddim_fast": __version__,
        "torch": torch.__version__,
    }
    evaluation = EvaluationRun(processes, device, results, run, arguments.batch_size, arguments.quiet)
    try:
        if arguments.images is not None:
            _measure_images(parser, arguments, evaluation)
        else:
            _measure_model(parser, arguments, evaluation)
    except KeyboardInterrupt:
        if processes.is_first:
            print(f"stopped: the same command goes on with what is in {arguments.out}", file=sys.stderr)
        raise
    if measures and processes.is_first:
        for path in results.report():
            print(path)


def _measure_images(parser: CommandParser, arguments: EvaluateSettings, evaluation: EvaluationRun) -> None:
    assert arguments.images is not None and arguments.reference is not None  # checked among the options
    with parser.usage_errors():
        network = _feature_network(arguments, evaluation)
        check_reference(arguments.reference, network)
        with notice(f"reading {arguments.images}", evaluation.is_silent):
            pictures = read_pictures(arguments.images)
        count = arguments.num_images or len(pictures)
        if len(pictures) < count:
            there = count_of(len(pictures), "images")
            raise ValueError(f"{arguments.images} holds {there}, fewer than the {count} of --num-images")
        if count < 2:
            raise ValueError(f"{arguments.images} holds one image; a distribution of images needs at least 2")
        pictures = pictures[:count]
        channels, height, width = pictures.shape[1:]
        evaluation.say(f"images: {arguments.images}, {count:,} of {describe([pictures.shape[1:]])}")
        evaluation.say(f"features: {network.name} on {evaluation.device}")
        reference = _reference(arguments.reference, evaluation, network, (channels, height, width))
    settings = {
        "model": None,
        "images": arguments.images,
        "content": survey(pictures).content,
        "reference": arguments.reference,
        "reference content": reference.content,
        "features": network.name,
        "num": count,
    }
    measure_pictures(evaluation, settings, pictures, network, reference)


def _measure_model(parser: CommandParser, arguments: EvaluateSettings, evaluation: EvaluationRun) -> None:
    folder = pixel_model(parser, arguments.model, "sample it with --out FILE.npz, and give that to --images")
    model = UNet.from_pretrained(folder)
    weights = {"model": arguments.model, "weights": f"sha256:{weights_checksum(model)}"}
    model, guide = model.to(evaluation.device), None
    if arguments.guide is not None:
        guide = load_model(parser, arguments.guide)[0].to(evaluation.device)
        weights |= {"guide": arguments.guide, "guide weights": f"sha256:{weights_checksum(guide)}"}
    with parser.usage_errors():
        # Impossible settings are found before anything is measured.
        check_interval(arguments.guidance_interval, arguments.guidance, model.config.num_train_timesteps)
        if arguments.guidance not in (None, 1) and guide is None and model.config.num_classes is None:
            raise ValueError(f"--guidance: {arguments.model} is unconditional, so guidance needs a --guide")
        for option in ("trajectory_error", "fit_solver"):
            if isinstance(arguments.guidance, list) and getattr(arguments, option):
                raise ValueError(f"--{option.replace('_', '-')} compares runs of different steps; give --guidance one scale")
        if arguments.reference is not None:
            network = _feature_network(arguments, evaluation)
            check_reference(arguments.reference, network, model.config.image_shape)
        data = None
        if arguments.data is not None:
            with notice(f"reading {arguments.data}", evaluation.is_silent):
                data = _data(arguments, arguments.data, model, evaluation.is_silent)
        held_out = {} if data is None else _held_out(arguments, data)
        for_quality, for_trajectories = (_draws(arguments, model, count) for count in (NUM_IMAGES, NUM_TRAJECTORIES))
        fits = arguments.fit_timesteps or arguments.fit_solver
        if not fits:  # the samplers may need what is fitted
            samplers = _checked_samplers(arguments, model, guide)
    dtype = select_dtype(arguments.dtype, arguments.compile, evaluation.device)
    evaluation.say(describe_model(arguments.model, [model], str(dtype).removeprefix("torch."), evaluation.device))
    evaluation.say(f"operators: {serving_line(evaluation.device, dtype)}")
    evaluation.say(f"images: {_numbers(arguments, data, for_quality[0], for_trajectories[0])}")
    if fits:
        _fit(parser, arguments, evaluation, model, guide, folder)
    with parser.usage_errors():
        if fits:
            samplers = _checked_samplers(arguments, model, guide)
        if arguments.reference is not None:
            reference = _reference(arguments.reference, evaluation, network, model.config.image_shape)
    if arguments.loss:
        assert data is not None  # checked among the options, as below
        measure_loss(evaluation, {**weights, **held_out, "dtype": "float32"}, model, data)
    if arguments.reconstruction:
        assert data is not None
        for settings, make in samplers:
            measure_reconstruction(evaluation, {**weights, **settings, **held_out}, make, data)
    if arguments.trajectory_error:
        draws, drawn = for_trajectories
        identity = [*(value for name, value in weights.items() if name.endswith("weights")), drawn]
        exact = functools.cache(lambda: exact_images(evaluation, model, guide, draws, identity))
        for settings, make in samplers:
            measure_trajectories(evaluation, {**weights, **settings, **drawn}, make, draws, exact)
    if arguments.reference is not None:
        draws, drawn = for_quality
        drawn |= {"reference": arguments.reference, "reference content": reference.content, "features": network.name}
        for settings, make in samplers:
            measure_samples(evaluation, {**weights, **settings, **drawn}, make, draws, network, reference)


def _check_settings(arguments: EvaluateSettings, settings: Settings) -> None:
    """Check that a sampler with these settings has the requested measures.

    Raises:
        ValueError: it lacks one.
    """
    guided = settings["guidance"] not in (None, 1)
    if arguments.reconstruction and (settings["solver"] != "ddim" or settings["eta"] != 0 or guided):
        raise ValueError("--reconstruction needs deterministic DDIM: --solver ddim, --eta 0, no --tolerance, no --guidance")
    scales = arguments.guidance
    if isinstance(scales, list) and len(scales) != settings["steps"]:
        raise ValueError(f"--guidance has {len(scales)} scales, and --steps {settings['steps']} takes as many as steps")
    if arguments.trajectory_error and (settings["solver"] in ("ddpm", "consistency") or settings["eta"] not in (None, 0)):
        raise ValueError("--trajectory-error needs a deterministic sampler: --eta 0 and neither --solver ddpm nor consistency")


def _numbers(arguments: EvaluateSettings, data: ImageSet | None, quality: SampleSet, trajectories: SampleSet) -> str:
    """The number of images of each measure, in words."""
    numbers = {
        "--reference": len(quality.seeds) if arguments.reference is not None else 0,
        "--trajectory-error": len(trajectories.seeds) if arguments.trajectory_error else 0,
        "--data": 0 if data is None else len(data),
        "--fit-timesteps": len(_CALIBRATION_SEEDS) if arguments.fit_timesteps else 0,
        "--fit-solver": len(_SOLVER_SEEDS) if arguments.fit_solver else 0,
    }
    return ", ".join(f"{number:,} for {option}" for option, number in numbers.items() if number)


def _feature_network(arguments: EvaluateSettings, evaluation: EvaluationRun) -> FeatureNetwork:
    name, path = arguments.inception or (None, default_weights())
    if not path.exists():
        raise FileNotFoundError(
            f"there is no feature network at {path}: --fetch-inception downloads it, --inception names one that is there"
        )
    return load_inception(path, name).to(evaluation.device)


def _reference(spec: str, evaluation: EvaluationRun, network: FeatureNetwork, image_shape: tuple[int, int, int]) -> Reference:
    with evaluation.progress("reference", 1) as bar:
        return load_reference(spec, image_shape, network, evaluation.processes, bar.of)


def _data(arguments: EvaluateSettings, spec: str, model: UNet, quiet: bool) -> ImageSet:
    config = model.config
    resizer = Resizer(config.image_shape[1])
    data = load_images(
        spec,
        config.in_channels,
        config.sample_size,
        num_classes=config.num_classes,
        class_names=config.class_names,
        labelled=config.num_classes is not None,
        resizer=resizer,
    )
    say_resized(resizer, quiet)
    if arguments.num_images is not None and len(data) < arguments.num_images:
        raise ValueError(f"{spec} holds {count_of(len(data), 'images')}, fewer than the {arguments.num_images} of --num-images")
    labels, classes = data.labels, config.num_classes
    if labels is not None and classes is not None and int(labels.max()) >= classes:
        raise ValueError(f"{spec}: class {int(labels.max())} is not one of the model's {classes}")
    return ImageSet(data.images[: arguments.num_images], None if labels is None else labels[: arguments.num_images])


def _held_out(arguments: EvaluateSettings, data: ImageSet) -> Settings:
    content = hashlib.sha256(data.images.numpy().tobytes())
    if data.labels is not None:  # the network takes labels
        content.update(data.labels.numpy().tobytes())
    return {"data": arguments.data, "data content": content.hexdigest(), "num": len(data)}


def _draws(arguments: EvaluateSettings, model: UNet, count: int) -> tuple[SampleSet, Settings]:
    """The images to sample (``count`` of them by default), and their description in the results."""
    seeds = range(arguments.seed, arguments.seed + (arguments.num_images or count))
    draws = SampleSet(seeds, seed_labels(arguments.classes, seeds, model.config), _guidance(arguments))
    return draws, {
        "class": None if model.config.num_classes is None else class_record(arguments.classes, model.config),
        "seeds": f"{seeds.start}-{seeds.stop - 1}",
        **draws.guidance,
    }


def _guidance(arguments: EvaluateSettings) -> Settings:
    """The guidance for the sampler and its description in the results, without an interval where none is given, as in older
    results."""
    interval = {} if arguments.guidance_interval is None else {"guidance_interval": arguments.guidance_interval}
    return {"guidance": arguments.guidance, **interval}


# Makes a sampler in the given dtype; None is the user's.
_MakeSampler = Callable[..., Sampler]


def _samplers(arguments: EvaluateSettings, model: UNet, guide: UNet | None) -> Iterator[tuple[Settings, _MakeSampler]]:
    """The samplers that the user names, each with its settings."""
    device = model.device
    dtype = select_dtype(arguments.dtype, arguments.compile, device)
    engine = select_engine(select_execution(arguments.engine, arguments.compile, device, arguments.dtype), device)
    denoiser_of = functools.cache(lambda chosen: Denoiser(model, dtype=chosen, guide=guide))

    def setting(engine: str, **options: Any) -> tuple[Settings, _MakeSampler]:
        def make(chosen: torch.dtype = dtype) -> Sampler:
            named = {name: value for name, value in options.items() if value is not None}
            if chosen == torch.int8:  # its scales are calibrated on the sampler's own timesteps
                return Sampler(model, guide=guide, engine=engine, dtype=chosen, **named)
            return Sampler(denoiser_of(chosen), engine=engine, **named)

        # Timesteps may be fitted again, so the record keeps them.
        fitted = {"timesteps": make(torch.float32).timesteps.tolist()} if options["spacing"] == ADAPTIVE else {}
        return {
            **options,
            **fitted,
            **_guidance(arguments),
            "dtype": str(dtype).removeprefix("torch."),
            "engine": engine,
        }, make

    for solver, spacing, eta in itertools.product(arguments.solver, arguments.spacing, arguments.eta):
        if solver == FITTED:  # it brings its timesteps
            if spacing != arguments.spacing[0]:
                continue
            spacing = ADAPTIVE
        if solver == "ddim" or eta == 0:  # only that solver takes eta
            for steps in arguments.steps:
                yield setting(engine, solver=solver, spacing=spacing, eta=eta, steps=steps, tolerance=None)
    for tolerance in arguments.tolerance:
        yield setting("eager", solver=None, spacing=None, eta=None, steps=None, tolerance=tolerance)


def _checked_samplers(arguments: EvaluateSettings, model: UNet, guide: UNet | None) -> list[tuple[Settings, _MakeSampler]]:
    """:func:`_samplers`, each checked to work and to have the measures; otherwise a ValueError. Empty if no measure samples."""
    if not (arguments.reference or arguments.trajectory_error or arguments.reconstruction):
        return []
    samplers = list(_samplers(arguments, model, guide))
    if not samplers:
        raise ValueError("--eta other than 0 needs --solver ddim, so there is no setting to measure")
    for settings, make in samplers:
        make(torch.float32)
        _check_settings(arguments, settings)
    return samplers


def _fit(
    parser: CommandParser,
    arguments: EvaluateSettings,
    evaluation: EvaluationRun,
    model: UNet,
    guide: UNet | None,
    path: Path,
) -> None:
    """Fit timesteps or solvers, write them beside the checkpoint, and give them to the model."""
    if not path.exists():
        parser.error(f"what is fitted is written beside the checkpoint, but {path} is on the Hub; download it into a folder")
    calibration = load_calibration(path)

    def options(seeds: range) -> dict[str, Any]:
        classes = model.config.num_classes
        labels = None if classes is None else [i % classes for i in range(len(seeds))]
        return {"seeds": seeds, "labels": labels, "progress": not evaluation.is_silent}

    def write(timesteps: dict[str, dict[int, list[int]]], coefficients: dict[int, list[list[float]]], **settings: Any) -> None:
        calibration.update(settings)
        print(f"wrote {save_timesteps(path, timesteps, calibration, coefficients)}")
        model.fitted_timesteps, model.fitted_coefficients = timesteps, coefficients

    def fit() -> tuple[Any, Any]:
        if arguments.fit_timesteps:
            given = options(_CALIBRATION_SEEDS)
            fitted = {**(model.fitted_timesteps or {}), **fit_timesteps(model, **given)}
            write(
                fitted,
                model.fitted_coefficients or {},
                seeds=_ends(_CALIBRATION_SEEDS),
                labels=given["labels"],
                ddim_fast=__version__,
            )
        condition = _guidance(arguments)
        guided = condition if guide is None else {**condition, "guide": arguments.guide}
        for steps in arguments.fit_solver or []:
            given = options(_SOLVER_SEEDS)
            solver = fit_solver(
                Denoiser(model, guide=guide), steps, **given, **condition, teacher_steps=arguments.teacher_steps
            )
            print(f"{steps} steps: {solver.before:.3f} from the teacher by UniPC, {solver.after:.3f} fitted (whitened)")
            before, coefficients = model.fitted_timesteps or {}, model.fitted_coefficients or {}
            timesteps = {**before, FITTED: {**before.get(FITTED, {}), steps: solver.timesteps}}
            distances = [solver.before, solver.after]
            record = {
                "seeds": _ends(_SOLVER_SEEDS),
                "teacher steps": arguments.teacher_steps,
                "distances": distances,
                **guided,
                "ddim_fast": __version__,
            }
            solvers = {**calibration.get(FITTED, {}), str(steps): record}
            write(timesteps, {**coefficients, steps: solver.coefficients}, **{FITTED: solvers})
        return model.fitted_timesteps, model.fitted_coefficients

    model.fitted_timesteps, model.fitted_coefficients = evaluation.processes.from_first(fit)


def _ends(seeds: range) -> str:
    return f"{seeds.start}-{seeds.stop - 1}"
