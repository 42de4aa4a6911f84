"""Sample images: ``python -m ddim_fast.sample --compile --steps 20``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .cli.options import (
    CLIP_HELP,
    DTYPES,
    ENGINES,
    GUIDE_HELP,
    INTERVAL_HELP,
    MODEL_HELP,
    SPACING_HELP,
    STEPS_HELP,
    check_guidance_options,
    check_some_guided,
    class_record,
    seed_labels,
    settle_steps,
)
from .cli.parser import CommandParser, list_integers, parse_eta, parse_integers, parse_positive, parse_spacing, run_command
from .cli.profiling import PROFILE_HELP, check_profile_options, print_profile
from .cli.progress import StepProgress, progress_of
from .cli.samplers import audio_of, load_sampler, select_dtype
from .diffusion.guidance import guided_steps
from .diffusion.solvers import SOLVERS
from .diffusion.step import SIGMA_HAT
from .diffusion.timesteps import ADAPTIVE, SPACINGS
from .io.pictures import image_format
from .io.processes import Processes
from .jobs.outputs import Batches, FileFolder, Output
from .jobs.overview import GRID_IMAGES, Film, save_grid
from .jobs.places import free_folder, output_at
from .jobs.sampling import Job, JobStep
from .models.checkpoint import DEFAULT_MODEL, resolve_model
from .models.checksum import weights_checksum
from .ops.devices import pick_device

if TYPE_CHECKING:
    from .cli.samplers import AnySampler
    from .deploy.onnx_sampler import OnnxSampler
    from .models.audio import AudioConfig

_EXAMPLES = """\
  python -m ddim_fast.sample --compile --steps 20
  python -m ddim_fast.sample --class horse --guidance 2 --seeds 0-31 --out horses
  python -m ddim_fast.sample --solver unipc --spacing adaptive --steps 5
  python -m ddim_fast.sample --eta 1 --steps 100 --trajectory film.gif
  python -m ddim_fast.sample --model runs/cifar10 --seeds 7,11,100-107 --grid grid.png
  python -m ddim_fast.sample --num-images 50000 --out samples.npz
  python -m ddim_fast.sample --model runs/digits --class 7/jackson,7/theo --seeds 0-9 --out sevens
  python -m ddim_fast.sample --engine onnx --model photos-onnx
  python -m ddim_fast.sample --profile --steps 20
  torchrun --nproc-per-node 8 -m ddim_fast.sample --num-images 50000 --batch-size 512 --out samples.npz
"""

# torch is imported when it is known to be needed: not with --engine onnx.
_ENGINES = (*ENGINES, "onnx")


def _parser() -> CommandParser:
    p = CommandParser("sample", "Sample images or sounds from a diffusion model.", _EXAMPLES)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    p.add_argument("--eta", metavar="X", type=parse_eta, help=_ETA_HELP)
    p.add_argument("--spacing", metavar="NAME|LIST", help=SPACING_HELP)
    p.add_argument("--tolerance", metavar="X", type=float, help=_TOLERANCE_HELP)
    p.add_argument("--solver", choices=SOLVERS, help="how a step is made (default: ddim)")
    p.add_argument("--clip", metavar="R", type=float, help=CLIP_HELP)
    which = p.add_mutually_exclusive_group()
    which.add_argument("--seeds", metavar="LIST", type=parse_integers, default="0-59", help="one image a seed: 0-63 or 1,5,7-9")
    which.add_argument("--num-images", metavar="N", type=parse_positive, help="the seeds 0 to N - 1")
    p.add_argument("--batch-size", metavar="N", type=parse_positive, default=64, help="images a network call")
    p.add_argument("--class", dest="classes", metavar="LIST", default="all", help=_CLASS_HELP)
    p.add_argument("--guidance", metavar="W", type=float, help="classifier-free guidance scale (default: none)")
    p.add_argument("--guidance-interval", metavar=("LO", "HI"), type=int, nargs=2, help=INTERVAL_HELP)
    p.add_argument("--guide", metavar="MODEL", help=GUIDE_HELP)
    p.add_argument("--compile", action="store_true", help=_COMPILE_HELP)
    p.add_argument("--engine", choices=_ENGINES, default="auto", help=_ENGINE_HELP)
    p.add_argument("--reuse", metavar="N", type=parse_positive, default=1, help=_REUSE_HELP)
    p.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    p.add_argument("--provider", metavar="P", help=_PROVIDER_HELP)
    p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=_DTYPE_HELP)
    p.add_argument("--out", metavar="DIR|FILE.npz", type=Path, help=_OUT_HELP)
    p.add_argument("--grid", metavar="FILE", type=Path, help=_GRID_HELP)
    p.add_argument("--trajectory", metavar="FILE.gif", type=Path, help="a film of the first batch, from noise to images")
    p.add_argument("--profile", action="store_true", help=PROFILE_HELP)
    p.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return p


_ETA_HELP = f"0: DDIM, 1: DDPM's variance, between, or {SIGMA_HAT} (default: 0.0)"
_OUT_HELP = (
    "a folder for a PNG a seed, of sounds a WAV, or one file for evaluations, of all images (arr_0) and their classes (arr_1). "
    "The same command goes on with an unfinished one (default: the folder samples, or samples-2 ... where that holds images)"
)
_GRID_HELP = (
    f"the first {GRID_IMAGES} images, or spectrograms of sounds, in one picture (default: grid.png or spectrograms.png in the "
    "folder; none beside a .npz file)"
)
_TOLERANCE_HELP = (
    "control the step size while sampling, instead of --steps and --spacing: the largest estimated error of a step, such as "
    "0.05; each image takes the steps it needs"
)
_COMPILE_HELP = (
    "the fastest execution on the device, in the precision it is fast at: on a GPU all steps compiled into one CUDA graph; "
    "on a CPU this package's C++ operators, or torch.compile where those were not built"
)
_REUSE_HELP = "compute the network's deep features in every Nth step only: faster, and an approximation (default: 1, each step)"
_ENGINE_HELP = (
    "name the execution, instead of --compile's choice. onnx: by ONNX Runtime, without torch; MODEL is what export --to onnx "
    "wrote, whose settings are the defaults then, or is exported at its first use"
)
_PROVIDER_HELP = (
    "with --engine onnx, ONNX Runtime's execution provider, such as cuda or cpu (default: the fastest that starts here)"
)
_DTYPE_HELP = (
    "what the network computes in; auto: with --compile bfloat16 where the device is fast at it, otherwise float32; "
    "int8: 8-bit convolutions, for CPUs"
)
_CLASS_HELP = (
    "for a class-conditional model: class numbers or names, used in turn; 'all', or 'none' for unconditional samples. A part "
    "of a name means each class that has it, as 7 does 7/jackson and 7/theo"
)


def main() -> None:
    parser = _parser()
    settings = _settings(parser)
    with Processes() as processes:
        _main(parser, settings, processes)


@dataclass(frozen=True)
class SampleSettings:
    """The command's settings. Steps that the options leave open are those of the export, or the usual ones."""

    model: str
    steps: int
    eta: float | str
    spacing: str
    tolerance: float | None
    solver: str
    clip: float | None
    seeds: Sequence[int]
    batch_size: int
    classes: str
    guidance: float | None
    guidance_interval: list[int] | None
    guide: str | None
    compile: bool
    engine: str
    reuse: int
    device: str
    provider: str | None
    dtype: str
    out: Path | None
    grid: Path | None
    trajectory: Path | None
    profile: bool
    quiet: bool


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
    usual = _exported(parser, options) if options["engine"] == "onnx" else {"eta": 0.0, "solver": "ddim"}
    options |= {name: value for name, value in usual.items() if options[name] is None}
    options["steps"], options["spacing"] = settle_steps(parser, options["steps"], options["spacing"])
    return SampleSettings(**options)


def _exported(parser: CommandParser, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a model was exported to ONNX with."""
    from .deploy.cache import ready_export
    from .deploy.folder import ExportFolder

    with parser.usage_errors():
        for option, given in {
            "--compile": options["compile"],
            "--reuse": options["reuse"] > 1,
            "--device": options["device"] != "auto",
            "--dtype": options["dtype"] != "auto",
            "--tolerance": options["tolerance"] is not None,
            "--guide": options["guide"] is not None,
        }.items():
            if given:
                hint = {"--device": " (see --provider)", "--dtype": " (see export --dtype)"}.get(option, "")
                raise ValueError(f"{option} is not an option of --engine onnx{hint}")
        resolve_model(options["model"])
    exported = ExportFolder.open(ready_export(options["model"])).settings
    listed = exported["spacing"] if isinstance(exported["spacing"], str) else ",".join(map(str, exported["spacing"]))
    own_list = options["spacing"] is not None and isinstance(parse_spacing(options["spacing"]), list)
    return {**exported, "spacing": listed, "steps": None if own_list else exported["steps"] or len(exported["spacing"])}


def _main(parser: CommandParser, settings: SampleSettings, processes: Processes) -> None:
    """Check everything, then sample what is not there yet."""
    sampler: AnySampler | OnnxSampler
    audio = None
    if settings.engine == "onnx":
        sampler, checksum, made_on = _onnx_sampler(parser, settings)
    else:
        sampler, checksum, made_on = _torch_sampler(parser, settings, processes)
        audio = audio_of(sampler)
    with parser.usage_errors():
        labels = seed_labels(settings.classes, settings.seeds, sampler.config)
        # Before anything is written or computed.
        sampler.check(
            seeds=settings.seeds,
            labels=labels,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
        )
        if settings.guidance_interval is not None and settings.tolerance is None:
            check_some_guided(sampler.timesteps, settings.guidance, settings.guidance_interval)
        if settings.tolerance is not None and settings.trajectory is not None:
            parser.error("--trajectory films steps that all images share; with --tolerance each image takes its own")
        if settings.trajectory is not None and settings.trajectory.suffix.lower() != ".gif":
            parser.error(f"--trajectory writes a GIF; got {str(settings.trajectory)!r}")
        if settings.grid is not None:
            image_format(settings.grid)
    channels, height, width = sampler.image_shape
    size = min(settings.batch_size, len(settings.seeds))
    batches = Batches(settings.seeds, labels, size, (height, width, channels))
    if settings.profile:
        guidance = {"guidance": settings.guidance, "guidance_interval": settings.guidance_interval}
        return print_profile(sampler, batches[0], settings.out, settings.quiet, **guidance)
    record = {
        "settings": _decisive(settings, sampler, checksum),
        "model": settings.model,
        **({} if settings.guide is None else {"guide": settings.guide}),
        "ddim_fast": __version__,
        **made_on,
    }
    path, missing = processes.from_first(lambda: _prepare(parser, settings, batches, audio, record))
    output = output_at(path, batches, audio)
    if missing is not None:
        _run(sampler, output, missing, settings, processes)
    elif processes.is_first and not settings.quiet:
        print(f"{path} is finished: it holds these {len(settings.seeds)} {output.noun}, made with these settings")


def _torch_sampler(
    parser: CommandParser, settings: SampleSettings, processes: Processes
) -> tuple[AnySampler, str, dict[str, str]]:
    """The sampler, the checksum of its weights, and what it runs on."""
    try:
        import torch
    except ModuleNotFoundError:
        raise RuntimeError("torch is not installed; without it there is --engine onnx") from None

    from .engine import fastest_engine

    with parser.usage_errors():
        if settings.provider is not None:
            raise ValueError("--provider is an option of --engine onnx")
        device = pick_device(processes.device_name(settings.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        processes.share_cores()
    sampler = load_sampler(
        parser,
        settings.model,
        device,
        settings.guide,
        steps=settings.steps,
        eta=settings.eta,
        spacing=parse_spacing(settings.spacing),
        solver=settings.solver,
        engine=fastest_engine(device) if settings.compile and settings.engine == "auto" else settings.engine,
        reuse=settings.reuse,
        tolerance=settings.tolerance,
        clip_sample_range=settings.clip,
        dtype=select_dtype(settings.dtype, settings.compile, device),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return sampler, weights_checksum(*sampler.networks), {"device": name, "torch": torch.__version__}


def _onnx_sampler(parser: CommandParser, settings: SampleSettings) -> tuple[OnnxSampler, str, dict[str, str]]:
    """The same by ONNX Runtime."""
    from .deploy.cache import ready_export
    from .deploy.onnx_sampler import OnnxSampler
    from .deploy.session import onnxruntime

    with parser.usage_errors():
        sampler = OnnxSampler(
            ready_export(settings.model),
            steps=settings.steps,
            eta=settings.eta,
            spacing=parse_spacing(settings.spacing),
            solver=settings.solver,
            clip_sample_range=settings.clip,
            provider=settings.provider,
        )
    sampler.load()  # before anything is written
    return sampler, sampler.folder.identity, {"device": sampler.provider, "onnxruntime": onnxruntime.__version__}


def _decisive(
    settings: SampleSettings, sampler: AnySampler | OnnxSampler, checksum: str
) -> dict[str, str | float | list[int] | None]:
    """The options that decide the images: the record that an unfinished output is compared with."""
    return {
        "model": f"sha256:{checksum}",
        "seeds": list_integers(settings.seeds),
        "class": class_record(settings.classes, sampler.config),
        "steps": settings.steps,
        # A fit can be made anew: then these are other timesteps.
        "spacing": list_integers(sampler.timesteps[::-1].tolist()) if settings.spacing == ADAPTIVE else settings.spacing,
        "tolerance": settings.tolerance,
        "solver": settings.solver,
        "eta": settings.eta,
        "clip": settings.clip,
        "guidance": settings.guidance,
        "guidance-interval": settings.guidance_interval,
        "batch-size": settings.batch_size,
        "engine": sampler.engine,
        "reuse": settings.reuse,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        **({"provider": sampler.provider} if hasattr(sampler, "provider") else {}),
    }


def _prepare(
    parser: CommandParser, settings: SampleSettings, batches: Batches, audio: AudioConfig | None, record: dict[str, Any]
) -> tuple[Path, list[int] | None]:
    """The place of the output, made ready, and the batches that it lacks; None when it is finished."""
    with parser.usage_errors():
        output = output_at(settings.out or free_folder(batches, audio, record["settings"]), batches, audio)
    there = output.record()
    with parser.usage_errors():
        output.check(there, record["settings"])
    for file in (settings.grid, settings.trajectory):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    missing = output.prepare(there, record)
    # A film is of the first batch, which is made again where a run without a film has made it.
    filmed = settings.trajectory is None or settings.trajectory.exists()
    if missing is None:
        if filmed and (settings.grid is None or settings.grid.exists()):
            return output.path, None
        if not isinstance(output, FileFolder):
            parser.error(f"{output.path} is finished, and a picture or a film is made together with it; choose another --out")
        missing = []
    if len(missing) < len(batches) and not settings.quiet:
        print(f"{output.path} holds {progress_of(batches, missing)} {output.noun}; going on")
    return output.path, missing if filmed or 0 in missing else [0, *missing]


def _run(
    sampler: AnySampler | OnnxSampler, output: Output, missing: list[int], settings: SampleSettings, processes: Processes
) -> None:
    """Sample the missing batches, write the files, and say what was done."""
    batches, steps, share = output.batches, len(sampler.timesteps), processes.share(missing)
    count = batches.count(missing)
    progress = StepProgress(output, steps, count, processes, settings.quiet)
    film = Film(settings.trajectory, steps, output.shown) if settings.trajectory is not None else None

    def watch(k: int) -> Callable[[JobStep], None] | None:
        filmed = film if k == 0 else None
        if sampler.runs_whole and filmed is None:
            return None  # one graph of all steps is faster than a bar that moves with each; or there are none in common

        def on_step(step: JobStep) -> None:
            progress.step(step)
            if filmed is not None:
                filmed.add(step)

        return on_step

    job = Job(sampler, batches, settings.guidance, watch, settings.guidance_interval, output.convert)
    try:
        started = time.perf_counter()
        if share:
            job.warm_up(share[0])
        warm_up = time.perf_counter() - started
        with progress:
            started = time.perf_counter()
            job.run(share, output, progress.batch)
            processes.wait()
            seconds = time.perf_counter() - started
    except KeyboardInterrupt:
        if processes.is_first:
            done = progress_of(batches, output.missing())
            print(f"stopped: {output.path} holds {done} {output.noun}; the same command goes on with it", file=sys.stderr)
        raise
    if processes.is_first:
        places = _finish(output, settings.grid)
        if not settings.quiet:
            made = (
                _summary(sampler, output.noun, count, seconds, warm_up, settings) if count else f"all {output.noun} were there"
            )
            print(f"{made}; pictures in {', '.join(map(str, places))}")


def _finish(output: Output, grid: Path | None) -> list[Path]:
    """Completes an output whose batches are all there; returns the files to look at."""
    if grid is None and isinstance(output, FileFolder):
        grid = output.path / output.overview
    if grid is not None:
        save_grid(grid, output)
    output.finish()
    return [output.path] if grid is None else [output.path, grid]


def _summary(
    sampler: AnySampler | OnnxSampler, noun: str, count: int, seconds: float, warm_up: float, settings: SampleSettings
) -> str:
    steps, dtype = len(sampler.timesteps), str(sampler.dtype).removeprefix("torch.")
    if sampler.tolerance is not None:
        spent: Any = getattr(sampler, "evaluations", None)
        return (
            f"{count} {noun} to tolerance {sampler.tolerance:g} in {seconds:.1f} s, {sampler.engine}, {dtype}: "
            f"{count / seconds:.2f} {noun}/s, those of the last batch by {spent.float().mean():.1f} network "
            f"evaluations each (warm-up {warm_up:.1f} s)"
        )
    interval = settings.guidance_interval
    guided = guided_steps(sampler.timesteps, settings.guidance, None if interval is None else (interval[0], interval[1]))
    evaluations = count * (steps + guided.sum())
    named = settings.spacing in SPACINGS and steps != settings.steps
    note = f"{settings.spacing} makes {steps} timesteps of {settings.steps} steps\n" if named else ""
    return note + (
        f"{count} {noun} of {steps} steps in {seconds:.1f} s, {sampler.engine}, {dtype}: {count / seconds:.2f} {noun}/s, "
        f"{evaluations / seconds:.1f} network evaluations/s (warm-up {warm_up:.1f} s)"
    )


if __name__ == "__main__":
    run_command(main)
