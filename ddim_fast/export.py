"""Convert a model, mostly for another program: ``python -m ddim_fast.export --to diffusers --model MODEL --out DIR``."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli.options import CLIP_HELP, MODEL_HELP, SPACING_HELP, STEPS_HELP, class_or_none, settle_steps
from .cli.parser import CommandParser, parse_eta, parse_positive, parse_spacing, run_command
from .cli.progress import notice
from .cli.samplers import pixel_model
from .diffusion.solvers import SOLVERS
from .io.files import atomic_folder
from .jobs.places import free_folder
from .models.checkpoint import (
    AUTOENCODER,
    DEFAULT_MODEL,
    SNAPSHOTS,
    local_model,
    resolve_model,
    save_checkpoint,
    timesteps_file,
)
from .models.config import UNetConfig, preset_names

if TYPE_CHECKING:
    from .models.unet import UNet

_EXAMPLES = """\
  python -m ddim_fast.export --to diffusers --model runs/photos --out photos-diffusers
  python -m ddim_fast.export --to diffusers --model ckpt.pth --out cifar10-diffusers
  python -m ddim_fast.export --to diffusers --class horse --out horses-diffusers
  python -m ddim_fast.export --to checkpoint --model runs/photos --dtype bfloat16 --max-shard-size 16MB --out photos-small
  python -m ddim_fast.export --to checkpoint --model runs/photos --ema-length 0.08 --out photos-08
  python -m ddim_fast.export --to checkpoint --widen cifar10-128 --model cifar10-64 --out cifar10-wide
  python -m ddim_fast.export --to stage --model runs/photos --dtype bfloat16 --max-shard-size 16MB --out photos-stage
  python -m ddim_fast.export --to onnx --model runs/photos --out photos-onnx
  python -m ddim_fast.export --to onnx --dtype int8 --solver unipc --spacing adaptive --steps 5 --out small
  python -m ddim_fast.export --to plan --model fashion-mnist --steps 10 --out fashion-plan
  python -m ddim_fast.export --to onnx --unroll --dtype float16 --optimize cuda --out for-cuda
"""

_DTYPES = ("float32", "float16", "bfloat16", "int8")

# The targets of an export, and the options that only some of them take.
_OPTIONS = {
    "checkpoint": ("dtype", "ema_length", "max_shard_size", "widen"),
    "stage": ("dtype", "max_shard_size"),
    "diffusers": (),
    "onnx": ("dtype", "steps", "eta", "spacing", "solver", "clip", "unroll", "opset", "optimize"),
    "plan": ("dtype", "steps", "eta", "spacing", "solver", "clip", "batch_size"),
}


def _parser() -> CommandParser:
    p = CommandParser("export", "Convert a model, for another program or to smaller files.", _EXAMPLES)
    p.add_argument("--to", choices=list(_OPTIONS), required=True, help=_TO_HELP)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--class", dest="label", metavar="CLASS", help=_CLASS_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write, new or empty")
    p.add_argument("--dtype", choices=_DTYPES, default="float32", help=_DTYPE_HELP)
    p.add_argument("--max-shard-size", metavar="SIZE", type=_size, help=_SHARD_HELP)
    p.add_argument("--ema-length", metavar="X", type=float, help=_LENGTH_HELP)
    p.add_argument("--widen", metavar="PRESET", choices=preset_names(), help=_WIDEN_HELP)
    sampler = p.add_argument_group("with --to onnx and --to plan")
    sampler.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    sampler.add_argument("--eta", metavar="X", type=parse_eta, default=0.0, help="as of ddim_fast.sample")
    sampler.add_argument("--spacing", metavar="NAME|LIST", help=SPACING_HELP)
    sampler.add_argument("--solver", choices=SOLVERS, default="ddim", help="solver of the exported sampler")
    sampler.add_argument("--clip", metavar="R", type=float, help=CLIP_HELP)
    plan = p.add_argument_group("with --to plan")
    plan.add_argument("--batch-size", metavar="N", type=parse_positive, default=1, help="images per run")
    onnx = p.add_argument_group("with --to onnx")
    onnx.add_argument("--unroll", action="store_true", help="write the steps one after the other, in place of an ONNX Loop")
    onnx.add_argument("--opset", metavar="N", type=int, help="version of ONNX's operators (default: 20; 22 for bfloat16)")
    onnx.add_argument(
        "--optimize", choices=["cuda"], help="fuse for ONNX Runtime's CUDA provider; the model then runs nowhere else"
    )
    return p


_TO_HELP = (
    "diffusers: a folder of a DDIMPipeline; onnx: a folder with the network and the whole sampler; plan: the whole sampler for "
    "this package's C++ operators, without torch and ONNX Runtime; checkpoint: a folder as ddim_fast.train writes it, in any "
    "precision; stage: two of them, with a run's averaged and its raw weights, to keep and to train on from"
)
_DTYPE_HELP = (
    "checkpoint, stage: dtype of the stored weights; onnx: dtype of the network's computation (int8: on CPUs); plan: the same, "
    "float32 or bfloat16"
)
_LENGTH_HELP = (
    "checkpoint: average the weights over this share of the training, up to 0.288, from the snapshots of ddim_fast.train "
    "--ema-snapshots (default: the run's own average)"
)
_WIDEN_HELP = (
    "checkpoint: a network of twice the channels with the same function, for ddim_fast.train --init; PRESET is the "
    "network it becomes"
)
_SHARD_HELP = "checkpoint, stage: split the weights into files of at most SIZE, such as 16MB"
_CLASS_HELP = (
    "class-conditional model: export one class by name or number, 'none' for samples without a label, or 'all' (default: all; "
    "required for diffusers, whose DDIMPipeline knows no classes)"
)


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    with parser.usage_errors():
        free_folder(settings.out, "export")
    if settings.to == "stage":
        _to_stage(parser, settings)
        return
    if settings.to == "checkpoint":
        with parser.usage_errors():
            resolve_model(settings.model)
        path = local_model(settings.model)
    else:
        path = pixel_model(parser, settings.model, "other programs' formats have no place for its autoencoder")
    with notice(f"reading {settings.model}"):
        from .models.formats.diffusers import fold_class  # these import more than --help needs
        from .models.unet import UNet
        from .training.averages import average_of_length

        model = UNet.from_pretrained(path)
    if settings.to == "diffusers":
        _check_pipeline(parser, settings, model)
    if settings.ema_length is not None:
        with parser.usage_errors():
            average = average_of_length(path / SNAPSHOTS, settings.ema_length)
        model.load_state_dict(average.weights)
        print(
            f"average of length {settings.ema_length:g} over {average.steps} steps of training; its averaging profile is "
            f"{average.error:.1%} off the requested one"
        )
    if settings.label not in (None, "all"):
        with parser.usage_errors():
            label = class_or_none(settings.label, model.config)
            config, state = fold_class(model.config, model.state_dict(), label)
        audio, model = model.audio, UNet(config).eval()
        model.load_state_dict(state)
        model.audio = audio
    if settings.widen is not None:
        with parser.usage_errors():
            model = _widened(settings.widen, model)
    try:
        if settings.to == "checkpoint":
            _to_checkpoint(settings, model, path)
        else:
            {"onnx": _to_onnx, "plan": _to_plan, "diffusers": _to_diffusers}[settings.to](parser, settings, model)
    except FileExistsError as error:
        parser.error(f"--out: {error}")


@dataclass(frozen=True)
class ExportSettings:
    """The command's settings, from its options."""

    to: str
    model: str
    label: str | None
    out: Path
    dtype: str
    max_shard_size: str | None
    ema_length: float | None
    widen: str | None
    steps: int
    eta: float | str
    spacing: str
    solver: str
    clip: float | None
    batch_size: int
    unroll: bool
    opset: int | None
    optimize: str | None


def _settings(parser: CommandParser) -> ExportSettings:
    """The settings; options of another target are a usage error."""
    options = vars(parser.parse_args())
    with parser.usage_errors():
        for name in sorted({name for names in _OPTIONS.values() for name in names} - {*_OPTIONS[options["to"]]}):
            if options[name] != parser.get_default(name):
                targets = " and ".join(f"--to {to}" for to, names in _OPTIONS.items() if name in names)
                raise ValueError(f"--{name.replace('_', '-')} is an option of {targets}")
        if options["to"] in ("checkpoint", "stage") and options["dtype"] == "int8":
            raise ValueError("--dtype int8 is for --to onnx; weights of a checkpoint are float32, float16 or bfloat16")
        if options["to"] == "stage" and options["label"] not in (None, "all"):
            raise ValueError(f"--class {options['label']}: a stage keeps all classes of its run; --to checkpoint exports one")
    options["steps"], options["spacing"] = settle_steps(parser, options["steps"], options["spacing"], options["solver"])
    return ExportSettings(**options)


def _widened(preset: str, model: UNet) -> UNet:
    from .models.widening import widen

    try:
        return widen(model, UNetConfig.preset(preset))
    except ValueError as error:
        raise ValueError(f"--widen {preset}: {error}") from None


def _to_checkpoint(settings: ExportSettings, model: UNet, path: Path) -> None:
    import torch

    state = {name: tensor.to(getattr(torch, settings.dtype)) for name, tensor in model.state_dict().items()}
    with notice(f"writing {settings.out}"), atomic_folder(settings.out) as new:
        save_checkpoint(new, model.config, state, model.audio, settings.max_shard_size)
        fitted = timesteps_file(path)
        # Fitted timesteps hold for all classes and these weights.
        if settings.label in (None, "all") and settings.ema_length is None and fitted.is_file():
            shutil.copyfile(fitted, timesteps_file(new))
        if (path / AUTOENCODER).is_dir():
            shutil.copytree(path / AUTOENCODER, new / AUTOENCODER)
    print(f"wrote {settings.out}; python -m ddim_fast.sample --model {settings.out} samples from it")


def _to_stage(parser: CommandParser, settings: ExportSettings) -> None:
    import torch

    from .training.stages import AVERAGED, RAW, write_stage

    try:
        with notice(f"writing {settings.out}"):
            write_stage(Path(settings.model), settings.out, getattr(torch, settings.dtype), settings.max_shard_size)
    except FileNotFoundError as error:
        parser.error(f"--model {settings.model}: {error}")
    print(
        f"wrote {settings.out}; python -m ddim_fast.sample --model {settings.out / AVERAGED} samples from it, and "
        f"python -m ddim_fast.train --init {settings.out / RAW} goes on"
    )


def _check_pipeline(parser: CommandParser, settings: ExportSettings, model: UNet) -> None:
    """A usage error where diffusers' DDIMPipeline could not sample the model."""
    classes = model.config.num_classes
    if model.audio is not None:
        parser.error(f"--model {settings.model} makes sounds; what its images mean as sound has no place in a DDIMPipeline")
    if classes is not None and settings.label is None:
        parser.error(
            f"--model {settings.model} has {classes} classes, and a DDIMPipeline gives its network none: choose one by "
            "--class N or --class none; --class all writes the network with all, for loops of your own"
        )


def _to_diffusers(parser: CommandParser, settings: ExportSettings, model: UNet) -> None:
    from .models.formats.diffusers import save_diffusers

    with notice(f"writing {settings.out}"):
        save_diffusers(settings.out, model.config, model.state_dict())
    classes = model.config.num_classes
    if classes is None:
        print(f"wrote {settings.out}; load it with diffusers.DDIMPipeline.from_pretrained({str(settings.out)!r})")
    else:
        print(
            f"wrote {settings.out}; load its network with "
            f"diffusers.UNet2DModel.from_pretrained({str(settings.out / 'unet')!r})\n"
            f"It takes class_labels 0..{classes - 1}, and {classes} for no label, which a DDIMPipeline does not give it."
        )


def _to_onnx(parser: CommandParser, settings: ExportSettings, model: UNet) -> None:
    try:
        from .deploy.onnx_export import export_onnx
    except ModuleNotFoundError as error:
        raise RuntimeError(f"exporting to ONNX needs {error.name}: pip install 'ddim_fast[onnx]'") from None
    with parser.usage_errors():
        export_onnx(
            settings.out,
            model,
            dtype=settings.dtype,
            opset=settings.opset,
            unroll=settings.unroll,
            optimize=settings.optimize,
            **_sampler_options(settings),
        )
    print(f"wrote {settings.out}; python -m ddim_fast.sample --engine onnx --model {settings.out} samples from it")
    if settings.optimize == "cuda":
        print("It has operators that only ONNX Runtime's CUDA provider has.")


def _to_plan(parser: CommandParser, settings: ExportSettings, model: UNet) -> None:
    from .deploy.plan_export import export_plan

    with parser.usage_errors():
        export_plan(settings.out, model, dtype=settings.dtype, batch_size=settings.batch_size, **_sampler_options(settings))
    print(f"wrote {settings.out}; python -m ddim_fast.sample --engine plan --model {settings.out} samples from it")


def _sampler_options(settings: ExportSettings) -> dict[str, Any]:
    """The options that exports of a whole sampler have in common."""
    spacing = parse_spacing(settings.spacing)
    return {
        "steps": None if isinstance(spacing, list) else settings.steps,
        "eta": settings.eta,
        "spacing": spacing,
        "solver": settings.solver,
        "clip_sample_range": settings.clip,
        "source": settings.model,
        "command": shlex.join(["python", "-m", "ddim_fast.export", *sys.argv[1:]]),
        "stage": notice,
    }


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500KB, 16MB or 2GB")
    return text


if __name__ == "__main__":
    run_command(main)
