"""Sample images: ``python -m ddim_fast.sample --compile --steps 20``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from . import __version__
from .cli.options import (
    CLIP_HELP,
    DTYPES,
    GUIDE_HELP,
    INTERVAL_HELP,
    MODEL_HELP,
    SPACING_HELP,
    STEPS_HELP,
    check_guidance_options,
    seed_labels,
    settle_steps,
)
from .cli.parser import CommandParser, list_integers, parse_eta, parse_integers, parse_positive, parse_spacing, run_command
from .cli.samplers import load_sampler, select_dtype
from .diffusion.guidance import guided_steps
from .diffusion.solvers import SOLVERS
from .diffusion.step import SIGMA_HAT
from .diffusion.timesteps import ADAPTIVE, SPACINGS
from .io.pictures import check_channels, image_format, image_grid, save_gif, save_image
from .io.processes import Processes
from .jobs.outputs import Batches, FileFolder, NpzFile, Output, PngFolder
from .jobs.sampling import Job, JobStep
from .models.checkpoint import DEFAULT_MODEL, resolve_model
from .models.checksum import weights_checksum
from .ops.devices import pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from .cli.samplers import AnySampler
    from .deploy.onnx_sampler import OnnxSampler
    from .models.audio import AudioConfig

_EXAMPLES = """\
  python -m ddim_fast.sample --compile --steps 20
  python -m ddim_fast.sample --class 7 --guidance 2 --seeds 0-31 --out horses
  python -m ddim_fast.sample --solver unipc --spacing adaptive --steps 5
  python -m ddim_fast.sample --eta 1 --steps 100 --trajectory film.gif
  python -m ddim_fast.sample --model runs/cifar10 --seeds 7,11,100-107 --grid grid.png
  python -m ddim_fast.sample --num-images 50000 --out samples.npz
  python -m ddim_fast.sample --model runs/digits --class 7/jackson,7/theo --seeds 0-9 --out sevens
  python -m ddim_fast.sample --engine onnx --model photos-onnx
  torchrun --nproc-per-node 8 -m ddim_fast.sample --num-images 50000 --batch-size 512 --out samples.npz
"""

# torch is imported when it is known to be needed: not with --engine onnx.
_ENGINES = ("auto", "eager", "compiled", "captured", "onnx")


def _parser() -> CommandParser:
    p = CommandParser("sample", "Sample images or sounds from a diffusion model.", _EXAMPLES)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--steps", metavar="S", type=int, help=STEPS_HELP)
    p.add_argument(
        "--eta", metavar="X", type=parse_eta, default=0.0, help=f"0: DDIM, 1: DDPM's variance, between, or {SIGMA_HAT}"
    )
    p.add_argument("--spacing", metavar="NAME|LIST", help=SPACING_HELP)
    p.add_argument("--tolerance", metavar="X", type=float, help=_TOLERANCE_HELP)
    p.add_argument("--solver", choices=SOLVERS, default="ddim", help="how a step is made")
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
    p.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return p


# A picture of more is no longer one to look at.
_GRID_IMAGES = 60

_OUT_HELP = (
    "a folder for a PNG a seed, of sounds a WAV, or one file for evaluations, of all images (arr_0) and their classes (arr_1). "
    "The same command goes on with an unfinished one (default: the folder samples, or samples-2 ... where that holds images)"
)
_GRID_HELP = (
    f"the first {_GRID_IMAGES} images, or spectrograms of sounds, in one picture (default: grid.png or spectrograms.png in the "
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
# Whoever gives --out one of these does not mean a folder.
_FILES = {".zip", ".npy", ".pt", ".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".mp4", ".wav"}
_CLASS_HELP = (
    "for a class-conditional model: class numbers, used in turn; 'all', or 'none' for unconditional samples. Of sounds, names: "
    "7/jackson, or a part of one, such as 7, which means each class that has it"
)


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.num_images is not None:
        arguments.seeds = range(arguments.num_images)
    with Processes() as processes:
        _main(parser, arguments, processes)


def _main(parser: CommandParser, arguments: argparse.Namespace, processes: Processes) -> None:
    """Check everything, then sample what is not there yet."""
    check_guidance_options(parser, arguments)
    if arguments.tolerance is not None and (arguments.steps, arguments.spacing) != (None, None):
        parser.error("--tolerance takes the place of --steps and --spacing; give one or the other")
    if arguments.engine == "onnx":
        sampler, checksum, made_on = _onnx_sampler(parser, arguments)
    else:
        sampler, checksum, made_on = _torch_sampler(parser, arguments, processes)
    audio = None if arguments.engine == "onnx" else sampler.model.audio
    with parser.usage_errors():
        labels = seed_labels(arguments.classes, arguments.seeds, sampler.config.num_classes, audio)
        # Before anything is written or computed.
        sampler.check(
            seeds=arguments.seeds,
            labels=labels,
            guidance=arguments.guidance,
            guidance_interval=arguments.guidance_interval,
        )
        if arguments.guidance_interval is not None and arguments.tolerance is None:
            _check_some_guided(sampler.timesteps, arguments)
        if arguments.tolerance is not None and arguments.trajectory is not None:
            parser.error("--trajectory films steps that all images share; with --tolerance each image takes its own")
        if arguments.trajectory is not None and arguments.trajectory.suffix.lower() != ".gif":
            parser.error(f"--trajectory writes a GIF; got {str(arguments.trajectory)!r}")
        if arguments.grid is not None:
            image_format(arguments.grid)
    channels, height, width = sampler.image_shape
    size = min(arguments.batch_size, len(arguments.seeds))
    batches = Batches(arguments.seeds, labels, size, (height, width, channels))
    record = {
        "settings": _settings(arguments, sampler, labels, checksum),
        "model": arguments.model,
        **({} if arguments.guide is None else {"guide": arguments.guide}),
        "ddim_fast": __version__,
        **made_on,
    }
    path, missing = processes.from_first(lambda: _prepare(parser, arguments, batches, audio, record))
    output = _output(path, batches, audio)
    if missing is not None:
        _run(sampler, output, missing, arguments, processes)
    elif processes.is_first and not arguments.quiet:
        print(f"{path} is finished: it holds these {len(arguments.seeds)} {output.noun}, made with these settings")


def _check_some_guided(timesteps: np.ndarray, arguments: argparse.Namespace) -> None:
    if not guided_steps(timesteps, arguments.guidance, arguments.guidance_interval).any() and arguments.guidance != 1:
        low, high = arguments.guidance_interval
        raise ValueError(
            f"--guidance-interval {low} {high}: no step is there, so nothing would be guided; they are at "
            + ", ".join(map(str, timesteps))
        )


def _torch_sampler(
    parser: CommandParser, arguments: argparse.Namespace, processes: Processes
) -> tuple[AnySampler, str, dict[str, str]]:
    """The sampler, the checksum of its weights, and what it runs on."""
    try:
        import torch
    except ModuleNotFoundError:
        raise RuntimeError("torch is not installed; without it there is --engine onnx") from None

    from .engine import fastest_engine

    settle_steps(parser, arguments)
    with parser.usage_errors():
        if arguments.provider is not None:
            raise ValueError("--provider is an option of --engine onnx")
        device = pick_device(processes.device_name(arguments.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        processes.share_cores()
    sampler = load_sampler(
        parser,
        arguments.model,
        device,
        arguments.guide,
        steps=arguments.steps,
        eta=arguments.eta,
        spacing=parse_spacing(arguments.spacing),
        solver=arguments.solver,
        engine=fastest_engine(device) if arguments.compile and arguments.engine == "auto" else arguments.engine,
        reuse=arguments.reuse,
        tolerance=arguments.tolerance,
        clip_sample_range=arguments.clip,
        dtype=select_dtype(arguments.dtype, arguments.compile, device),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return sampler, weights_checksum(*sampler.networks), {"device": name, "torch": torch.__version__}


def _onnx_sampler(parser: CommandParser, arguments: argparse.Namespace) -> tuple[OnnxSampler, str, dict[str, str]]:
    """The same by ONNX Runtime. Options that are not given are as the model was exported."""
    from .deploy.cache import ready_export
    from .deploy.folder import ExportFolder

    with parser.usage_errors():
        for option, given in {
            "--compile": arguments.compile,
            "--reuse": arguments.reuse > 1,
            "--device": arguments.device != "auto",
            "--dtype": arguments.dtype != "auto",
            "--tolerance": arguments.tolerance is not None,
            "--guide": arguments.guide is not None,
        }.items():
            if given:
                hint = {"--device": " (see --provider)", "--dtype": " (see export --dtype)"}.get(option, "")
                raise ValueError(f"{option} is not an option of --engine onnx{hint}")
        resolve_model(arguments.model)
    folder = ready_export(arguments.model)
    exported = ExportFolder.open(folder).settings
    listed = exported["spacing"] if isinstance(exported["spacing"], str) else ",".join(map(str, exported["spacing"]))
    own_list = arguments.spacing is not None and isinstance(parse_spacing(arguments.spacing), list)
    steps = None if own_list else exported["steps"] or len(exported["spacing"])
    parser.set_defaults(**{**exported, "steps": steps, "spacing": listed})
    vars(arguments).update({name: getattr(parser.parse_args(), name) for name in exported})
    settle_steps(parser, arguments)

    from .deploy.onnx_sampler import OnnxSampler
    from .deploy.session import onnxruntime

    with parser.usage_errors():
        sampler = OnnxSampler(
            folder,
            steps=arguments.steps,
            eta=arguments.eta,
            spacing=parse_spacing(arguments.spacing),
            solver=arguments.solver,
            clip_sample_range=arguments.clip,
            provider=arguments.provider,
        )
    sampler.load()  # before anything is written
    return sampler, sampler.folder.identity, {"device": sampler.provider, "onnxruntime": onnxruntime.__version__}


def _settings(
    arguments: argparse.Namespace, sampler: AnySampler | OnnxSampler, labels: list[int] | None, checksum: str
) -> dict[str, str | float | list[int] | None]:
    """What decides the images, by option: the record that an unfinished output is compared with."""
    return {
        "model": f"sha256:{checksum}",
        "seeds": list_integers(arguments.seeds),
        "class": "none" if labels is None else arguments.classes,
        "steps": arguments.steps,
        # A fit can be made anew: then these are other timesteps.
        "spacing": list_integers(sampler.timesteps[::-1].tolist()) if arguments.spacing == ADAPTIVE else arguments.spacing,
        "tolerance": arguments.tolerance,
        "solver": arguments.solver,
        "eta": arguments.eta,
        "clip": arguments.clip,
        "guidance": arguments.guidance,
        "guidance-interval": arguments.guidance_interval,
        "batch-size": arguments.batch_size,
        "engine": sampler.engine,
        "reuse": arguments.reuse,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        **({"provider": sampler.provider} if sampler.engine == "onnx" else {}),
    }


def _output(path: Path, batches: Batches, audio: AudioConfig | None) -> Output:
    if audio is not None:
        from .jobs.sound_outputs import WavFolder

        return WavFolder(path, batches, audio)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return NpzFile(path, batches)
    if suffix in _FILES:
        raise ValueError(f"--out {path} would be a folder of that name; give a folder, or for images an .npz file")
    check_channels(batches.image_shape[2], "--out FILE.npz holds them as they are")
    return PngFolder(path, batches)


def _prepare(
    parser: CommandParser, arguments: argparse.Namespace, batches: Batches, audio: AudioConfig | None, record: dict[str, Any]
) -> tuple[Path, list[int] | None]:
    """The place of the output, made ready, and the batches that it lacks; None when it is finished."""
    with parser.usage_errors():
        output = _output(arguments.out or _free_folder(batches, audio, record["settings"]), batches, audio)
    there = output.record()
    with parser.usage_errors():
        output.check(there, record["settings"])
    for file in (arguments.grid, arguments.trajectory):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    missing = output.prepare(there, record)
    # A film is of the first batch, which is made again where a run without a film has made it.
    filmed = arguments.trajectory is None or arguments.trajectory.exists()
    if missing is None:
        if filmed and (arguments.grid is None or arguments.grid.exists()):
            return output.path, None
        if not isinstance(output, FileFolder):
            parser.error(f"{output.path} is finished, and a picture or a film is made together with it; choose another --out")
        missing = []
    if len(missing) < len(batches) and not arguments.quiet:
        print(f"{output.path} holds {_progress_of(batches, missing)} {output.noun}; going on")
    return output.path, missing if filmed or 0 in missing else [0, *missing]


def _free_folder(batches: Batches, audio: AudioConfig | None, settings: dict[str, Any]) -> Path:
    """The folder of a run that names none: an unfinished one with these settings, or else the next that holds no images."""
    for number in itertools.count(1):
        folder = _output(Path("samples" if number == 1 else f"samples-{number}"), batches, audio)
        with contextlib.suppress(ValueError):
            record = folder.record()
            folder.check(record, settings)
            if record is None or not record["finished"]:
                return folder.path


def _run(
    sampler: AnySampler | OnnxSampler, output: Output, missing: list[int], arguments: argparse.Namespace, processes: Processes
) -> None:
    """Sample the missing batches, write the files, and say what was done."""
    batches, steps, share = output.batches, len(sampler.timesteps), processes.share(missing)
    count = batches.count(missing)
    progress = _Progress(output, steps, count, processes, arguments.quiet)
    film = _Film(arguments.trajectory, steps, output.shown) if arguments.trajectory is not None else None

    def watch(k: int) -> Callable[[JobStep], None] | None:
        filmed = film is not None and k == 0
        if sampler.runs_whole and not filmed:
            return None  # one graph of all steps is faster than a bar that moves with each; or there are none in common

        def on_step(step: JobStep) -> None:
            progress.step(step)
            if filmed:
                film.add(step)

        return on_step

    job = Job(sampler, batches, arguments.guidance, watch, arguments.guidance_interval, output.convert)
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
            done = _progress_of(batches, output.missing())
            print(f"stopped: {output.path} holds {done} {output.noun}; the same command goes on with it", file=sys.stderr)
        raise
    if processes.is_first:
        places = _finish(output, arguments.grid)
        if not arguments.quiet:
            made = (
                _summary(sampler, output.noun, count, seconds, warm_up, arguments) if count else f"all {output.noun} were there"
            )
            print(f"{made}; pictures in {', '.join(map(str, places))}")


def _finish(output: Output, grid: Path | None) -> list[Path]:
    """What is left to do when every batch is there; returns what there is to look at."""
    if grid is None and isinstance(output, FileFolder):
        grid = output.path / output.overview
    if grid is not None:
        images = output.preview(_GRID_IMAGES)
        save_image(grid, image_grid(images), _scale(images))
    output.finish()
    return [output.path] if grid is None else [output.path, grid]


def _summary(
    sampler: AnySampler | OnnxSampler, noun: str, count: int, seconds: float, warm_up: float, arguments: argparse.Namespace
) -> str:
    steps, dtype = len(sampler.timesteps), str(sampler.dtype).removeprefix("torch.")
    if sampler.tolerance is not None:
        return (
            f"{count} {noun} to tolerance {sampler.tolerance:g} in {seconds:.1f} s, {sampler.engine}, {dtype}: "
            f"{count / seconds:.2f} {noun}/s, those of the last batch by {sampler.evaluations.float().mean():.1f} network "
            f"evaluations each (warm-up {warm_up:.1f} s)"
        )
    guided = guided_steps(sampler.timesteps, arguments.guidance, arguments.guidance_interval)
    evaluations = count * (steps + guided.sum())
    named = arguments.spacing in SPACINGS and steps != arguments.steps
    note = f"{arguments.spacing} makes {steps} timesteps of {arguments.steps} steps\n" if named else ""
    return note + (
        f"{count} {noun} of {steps} steps in {seconds:.1f} s, {sampler.engine}, {dtype}: {count / seconds:.2f} {noun}/s, "
        f"{evaluations / seconds:.1f} network evaluations/s (warm-up {warm_up:.1f} s)"
    )


class _Progress:
    """A bar that counts the images of all processes, and moves with each step of this one's sampler."""

    def __init__(self, output: Output, steps: int, missing: int, processes: Processes, quiet: bool) -> None:
        self._batches, self._noun, self._steps, self._processes = output.batches, output.noun, steps, processes
        self._there = self._done = len(output.batches.seeds) - missing
        self._quiet = quiet or not processes.is_first

    def __enter__(self) -> _Progress:
        self._bar = tqdm(
            total=len(self._batches.seeds),
            initial=self._there,
            unit=f" {self._noun}",
            bar_format=f"{{l_bar}}{{bar}}| {{n:.0f}}/{{total}} {self._noun} [{{elapsed}}<{{remaining}}, {{rate_noinv_fmt}}]",
            disable=self._quiet,
            file=sys.stderr,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._show(len(self._batches.seeds))
        self._bar.close()

    def step(self, step: JobStep) -> None:
        """A step was made: so much of a batch is a part of its images."""
        part = (step.call + (step.state.step + 1) / self._steps) / step.calls
        self._show(self._done + part * self._batches.count([step.batch]))

    def batch(self, k: int) -> None:
        """Batch k is made."""
        self._done = self._there + self._processes.add_done(self._batches.count([k]))
        self._show(self._done)

    def _show(self, images: float) -> None:
        self._bar.update(images - self._bar.n)


class _Film:
    """The steps of the first batch, from noise to images, written when the last one is made."""

    def __init__(self, path: Path, steps: int, shown: Callable[[Tensor], Tensor]) -> None:
        self._path, self._steps, self._shown = path, steps, shown
        self._frames: list[np.ndarray] = []

    def add(self, step: JobStep) -> None:
        """One more frame. Of a batch that memory does not hold, the film shows the part that is made first."""
        if step.call > 0:
            return
        if step.state.step == 0:
            self._frames.clear()
        images = self._shown(step.state.x[:_GRID_IMAGES])
        self._frames.append(image_grid(images))
        if step.state.step == self._steps - 1:
            save_gif(self._path, self._frames, _scale(images))


def _progress_of(batches: Batches, missing: list[int]) -> str:
    """How many images there are, as "40 of 60"."""
    return f"{len(batches.seeds) - batches.count(missing)} of {len(batches.seeds)}"


def _scale(images: Tensor | np.ndarray) -> int:
    """How many pixels wide a pixel of small (N, C, H, W) images is shown."""
    return max(1, 64 // images.shape[2])


if __name__ == "__main__":
    run_command(main)
