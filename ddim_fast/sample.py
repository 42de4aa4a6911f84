"""Sample images: ``python -m ddim_fast.sample --compile --steps 20``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cli.options import (
    CLIP_HELP,
    ENGINES,
    EXECUTION,
    GUIDE_HELP,
    INTERVAL_HELP,
    MODEL_HELP,
    OUTPUT,
    SAMPLING,
    add_execution_options,
    add_output_options,
    add_step_options,
    check_guidance_options,
    settle_steps,
)
from .cli.parser import CommandParser, parse_eta, parse_guidance, parse_integers, parse_positive, parse_spacing, run_command
from .cli.profiling import PROFILE_HELP, check_profile_options
from .cli.settings import SAMPLES_FOLDER, SampleSettings
from .diffusion.solvers import SOLVERS
from .diffusion.step import SIGMA_HAT
from .io.processes import Processes
from .jobs.overview import GRID_IMAGES
from .models.checkpoint import AUDIO, AUTOENCODER, DEFAULT_MODEL, resolve_model

_EXAMPLES = """\
  python -m ddim_fast.sample --compile --steps 20
  python -m ddim_fast.sample --class horse --guidance 2 --seeds 0-31 --out horses
  python -m ddim_fast.sample --solver unipc --spacing adaptive --steps 5
  python -m ddim_fast.sample --eta 1 --steps 100 --trajectory film.gif
  python -m ddim_fast.sample --model runs/cifar10 --seeds 7,11,100-107 --grid grid.png
  python -m ddim_fast.sample --num-images 50000 --out samples.npz
  python -m ddim_fast.sample --model runs/digits --class 7/jackson,7/theo --seeds 0-9 --out sevens
  python -m ddim_fast.sample --engine onnx --model photos-onnx
  python -m ddim_fast.sample --engine plan --model fashion-plan
  python -m ddim_fast.sample --profile --steps 20
  torchrun --nproc-per-node 8 -m ddim_fast.sample --num-images 50000 --batch-size 512 --out samples.npz
"""

# torch is imported only where it is needed: not with --engine onnx.
_ENGINES = (*ENGINES, "onnx", "plan")


def _parser() -> CommandParser:
    p = CommandParser("sample", "Sample images or sounds from a diffusion model.", _EXAMPLES)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    which = p.add_mutually_exclusive_group()
    which.add_argument(
        "--seeds", metavar="LIST", type=parse_integers, default="0-59", help="one image per seed: 0-63 or 1,5,7-9"
    )
    which.add_argument("--num-images", metavar="N", type=parse_positive, help="the seeds 0 to N - 1")
    p.add_argument("--class", dest="classes", metavar="LIST", default="all", help=_CLASS_HELP)
    add_step_options(p)
    sampling = p.group(SAMPLING)
    sampling.add_argument("--solver", choices=SOLVERS, help="solver of the sampling ODE (default: ddim)")
    sampling.add_argument("--eta", metavar="X", type=parse_eta, help=_ETA_HELP)
    sampling.add_argument("--tolerance", metavar="X", type=float, help=_TOLERANCE_HELP)
    sampling.add_argument("--clip", metavar="R", type=float, help=CLIP_HELP)
    sampling.add_argument("--guidance", metavar="W", type=parse_guidance, help=_GUIDANCE_HELP)
    sampling.add_argument("--guidance-interval", metavar=("LO", "HI"), type=int, nargs=2, help=INTERVAL_HELP)
    sampling.add_argument("--guide", metavar="MODEL", help=GUIDE_HELP)
    sampling.add_argument("--reuse", metavar="N", type=parse_positive, default=1, help=_REUSE_HELP)
    add_execution_options(p, _ENGINES)
    execution = p.group(EXECUTION)
    execution.add_argument("--provider", metavar="P", help=_PROVIDER_HELP)
    execution.add_argument("--profile", action="store_true", help=PROFILE_HELP)
    add_output_options(p, SAMPLES_FOLDER, _OUT_HELP, metavar="DIR|FILE.npz")
    output = p.group(OUTPUT)
    output.add_argument("--grid", metavar="FILE", type=Path, help=_GRID_HELP)
    output.add_argument("--trajectory", metavar="FILE.gif", type=Path, help="a film of the first batch, from noise to images")
    return p


_GUIDANCE_HELP = (
    "classifier-free guidance scale for images of a class, or the scale of each step, as 1,3,3,1; 1 is off (default: the best "
    "one named by the model's card, if any)"
)
_ETA_HELP = f"0: DDIM, 1: DDPM's variance, any value between, or {SIGMA_HAT} (default: 0.0)"
_OUT_HELP = (
    "a folder for one PNG (sounds: WAV) per seed; or one .npz file for evaluations, with all images (arr_0) and classes "
    "(arr_1). The same command continues an unfinished one"
)
_GRID_HELP = (
    f"the first {GRID_IMAGES} images, or spectrograms of sounds, in one picture (default: grid.png or spectrograms.png in the "
    "folder; none beside a .npz file)"
)
_TOLERANCE_HELP = (
    "adaptive step size instead of --steps and --spacing: the largest estimated error of a step, such as 0.05; each image "
    "takes as many steps as it needs"
)
_REUSE_HELP = "compute the network's deep features in every Nth step only, a faster approximation; 1 is every step"
_PROVIDER_HELP = (
    "with --engine onnx, ONNX Runtime's execution provider, such as cuda or cpu (default: the fastest that starts here)"
)
_CLASS_HELP = (
    "for a class-conditional model: class numbers or names, used in turn; 'all', or 'none' for unconditional samples. A part "
    "of a name means every class that has it: 7 means 7/jackson and 7/theo"
)


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    from .cli.sampling import run_sampling

    with Processes() as processes:
        run_sampling(parser, settings, processes)


def _settings(parser: CommandParser) -> SampleSettings:
    """The settings; options that contradict each other are a usage error."""
    options = vars(parser.parse_args())
    number = options.pop("num_images")
    if number is not None:
        options["seeds"] = range(number)
    check_guidance_options(parser, options)
    check_profile_options(parser, options)
    if options["tolerance"] is not None and (options["steps"], options["spacing"]) != (None, None):
        parser.error("--tolerance takes the place of --steps and --spacing; give one or the other")
    exported = {"onnx": _exported, "plan": _planned}.get(options["engine"])
    usual = exported(parser, options) if exported else {"eta": 0.0, "solver": "ddim"}
    options |= {name: value for name, value in usual.items() if options[name] is None}
    options["steps"], options["spacing"] = settle_steps(parser, options["steps"], options["spacing"], options["solver"])
    return SampleSettings(**options)


def _exported(parser: CommandParser, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a model was exported to ONNX with."""
    from .deploy.cache import ready_export
    from .deploy.folder import ExportFolder
    from .deploy.session import pick_provider

    with parser.usage_errors():
        _check_exported(options, {"--device": " (see --provider)", "--dtype": " (see export --dtype)"})
        if options["provider"] is not None:
            pick_provider(options["provider"])  # checked before a model is exported
        folder = Path(resolve_model(options["model"]))
        for part, what in ((AUTOENCODER, "an autoencoder's latents"), (AUDIO, "sounds")):
            if (folder / part).exists():
                raise ValueError(f"--model {options['model']} is a model of {what}, which needs torch: leave out --engine onnx")
    return _settled(options, ExportFolder.open(ready_export(options["model"])).settings)


def _planned(parser: CommandParser, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a model was exported to a plan with. They are fixed."""
    from .deploy.folder import is_plan
    from .deploy.plan_folder import PlanFolder

    with parser.usage_errors():
        _check_exported(options, {"--dtype": " (see export --dtype)"})
        folder = Path(options["model"])
        if not is_plan(folder):
            raise ValueError(f"--engine plan samples from a folder of export --to plan; {str(folder)!r} is none")
        settings = _settled(options, PlanFolder.open(folder).description["settings"])
        for name, value in settings.items():
            if options[name] not in (None, value):
                raise ValueError(f"--{name} {options[name]} is not that of the plan, {value}; export the model again")
        for option in ("provider", "guidance_interval", "trajectory"):
            if options[option] is not None:
                raise ValueError(f"--{option.replace('_', '-')} is not an option of --engine plan")
    return settings


def _check_exported(options: dict[str, Any], hints: dict[str, str]) -> None:
    """Raise ValueError for options that no export takes.

    Args:
        hints: what to add to the messages, by option.
    """
    for option, given in {
        "--compile": options["compile"],
        "--reuse": options["reuse"] > 1,
        "--device": options["device"] != "auto",
        "--dtype": options["dtype"] != "auto",
        "--tolerance": options["tolerance"] is not None,
        "--guide": options["guide"] is not None,
    }.items():
        if given:
            raise ValueError(f"{option} is not an option of --engine {options['engine']}{hints.get(option, '')}")


def _settled(options: dict[str, Any], exported: dict[str, Any]) -> dict[str, Any]:
    """An export's settings as options of the command."""
    listed = exported["spacing"] if isinstance(exported["spacing"], str) else ",".join(map(str, exported["spacing"]))
    own_list = options["spacing"] is not None and isinstance(parse_spacing(options["spacing"]), list)
    return {**exported, "spacing": listed, "steps": None if own_list else exported["steps"] or len(exported["spacing"])}


if __name__ == "__main__":
    run_command(main)
