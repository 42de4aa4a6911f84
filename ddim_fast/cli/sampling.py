"""The work of ``python -m ddim_fast.sample``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..diffusion.guidance import guided_steps
from ..diffusion.timesteps import ADAPTIVE, SPACINGS
from ..io.pictures import image_format
from ..io.processes import Processes
from ..io.progress import collect, duration
from ..jobs.outputs import Batches, FileFolder, Output, require_parents
from ..jobs.overview import Film, save_grid
from ..jobs.places import free_folder, output_at, place_output
from ..jobs.sampling import Job
from ..models.checksum import weights_checksum
from .options import check_some_guided, class_record, seed_labels, usual_batch_size
from .parser import CommandParser, list_integers, parse_spacing
from .profiling import print_profile
from .progress import announce, count_of, job_progress, notice, say
from .samplers import audio_of, load_sampler, select_dtype, select_execution
from .settings import SAMPLES_FOLDER, SampleSettings

if TYPE_CHECKING:
    from ..deploy.onnx_sampler import OnnxSampler
    from ..deploy.plan_sampler import PlanSampler
    from ..models.audio import AudioConfig
    from .samplers import AnySampler

__all__ = ["run_sampling"]


def run_sampling(parser: CommandParser, settings: SampleSettings, processes: Processes) -> None:
    """Check the settings, then sample the missing images."""
    sampler: AnySampler | OnnxSampler | PlanSampler
    audio = None
    with notice(f"loading {settings.model}", settings.quiet or not processes.is_first):
        if settings.engine == "onnx":
            sampler, checksum, made_on = _onnx_sampler(parser, settings)
        elif settings.engine == "plan":
            sampler, checksum, made_on = _plan_sampler(parser, settings)
        else:
            sampler, checksum, made_on = _torch_sampler(parser, settings, processes)
            audio = audio_of(sampler)
    with parser.usage_errors():
        labels = seed_labels(settings.classes, settings.seeds, sampler.config)
        if settings.guidance is None and labels is not None:
            settings = dataclasses.replace(settings, guidance=sampler.config.guidance)
        # Checked before anything is written or computed.
        sampler.check(
            seeds=settings.seeds,
            labels=labels,
            guidance=settings.guidance,
            guidance_interval=settings.guidance_interval,
        )
        if settings.guidance_interval is not None and settings.tolerance is None:
            check_some_guided(sampler.timesteps, settings.guidance, settings.guidance_interval)
        if settings.tolerance is not None and settings.trajectory is not None:
            parser.error(
                "--trajectory films steps that all images share, but with --tolerance each image takes its own; "
                "leave out one of them"
            )
        if settings.trajectory is not None and settings.trajectory.suffix.lower() != ".gif":
            parser.error(f"--trajectory writes a GIF; got {str(settings.trajectory)!r}")
        if settings.grid is not None:
            image_format(settings.grid)
            if settings.grid == settings.trajectory:
                raise ValueError(f"--grid and --trajectory are both {settings.grid}; name two files")
        for option, file in (("--grid", settings.grid), ("--trajectory", settings.trajectory)):
            if file is not None:
                require_parents(option, file)
    channels, height, width = sampler.image_shape
    size = settings.batch_size or usual_batch_size(getattr(sampler, "provider", sampler.device.type))
    batches = Batches(settings.seeds, labels, min(size, len(settings.seeds)), (height, width, channels))
    if settings.profile:
        guidance = {"guidance": settings.guidance, "guidance_interval": settings.guidance_interval}
        with parser.usage_errors():
            folder = free_folder(settings.out, "profile")
        announce(settings, sampler, f"profiling a batch of {batches.size}", settings.quiet)
        return print_profile(sampler, batches[0], folder, settings.quiet, **guidance)
    record = {
        "command": "sample",
        "settings": _decisive(settings, sampler, batches, checksum),
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
        there = count_of(len(settings.seeds), output.noun)
        print(f"{path} is finished: it holds these {there}, made with these settings")


def _torch_sampler(
    parser: CommandParser, settings: SampleSettings, processes: Processes
) -> tuple[AnySampler, str, dict[str, str]]:
    """The sampler, the checksum of its weights, and what it runs on."""
    try:
        import torch
    except ModuleNotFoundError:
        raise RuntimeError("torch is not installed; --engine onnx and --engine plan sample without it") from None

    from ..ops.devices import pick_device

    with parser.usage_errors():
        if settings.provider is not None:
            raise ValueError("--provider needs --engine onnx")
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
        engine=_engine(settings, device),
        reuse=settings.reuse,
        tolerance=settings.tolerance,
        clip_sample_range=settings.clip,
        dtype=select_dtype(settings.dtype, settings.compile, device),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return sampler, weights_checksum(*sampler.networks), {"device": name, "torch": torch.__version__}


def _engine(settings: SampleSettings, device: Any) -> str:
    """The engine of a run. With a tolerance no steps are known before it, so only eager can serve."""
    if settings.tolerance is not None:
        return settings.engine
    return select_execution(settings.engine, settings.compile, device, settings.dtype)


def _onnx_sampler(parser: CommandParser, settings: SampleSettings) -> tuple[OnnxSampler, str, dict[str, str]]:
    """The same for ONNX Runtime."""
    from ..deploy.cache import ready_export
    from ..deploy.onnx_sampler import OnnxSampler
    from ..deploy.session import onnxruntime

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
    sampler.load()  # checked before anything is written
    return sampler, sampler.folder.identity, {"device": sampler.provider, "onnxruntime": onnxruntime.__version__}


def _plan_sampler(parser: CommandParser, settings: SampleSettings) -> tuple[PlanSampler, str, dict[str, str]]:
    """The same for a plan of native operators."""
    from ..deploy.plan_sampler import PlanSampler
    from ..ops import native

    with parser.usage_errors():
        sampler = PlanSampler(settings.model)
    return sampler, sampler.folder.identity, {"device": "cpu", "instruction_set": native.module.instruction_set()}


def _decisive(
    settings: SampleSettings, sampler: AnySampler | OnnxSampler | PlanSampler, batches: Batches, checksum: str
) -> dict[str, str | float | list[int] | list[float] | None]:
    """The options that decide the images, to compare with an unfinished output's record."""
    return {
        "model": f"sha256:{checksum}",
        "seeds": list_integers(settings.seeds),
        "class": class_record(settings.classes, sampler.config),
        "steps": settings.steps,
        # Timesteps may be fitted again, so the record keeps them.
        "spacing": list_integers(sampler.timesteps[::-1].tolist()) if settings.spacing == ADAPTIVE else settings.spacing,
        "tolerance": settings.tolerance,
        "solver": settings.solver,
        "eta": settings.eta,
        "clip": settings.clip,
        "guidance": settings.guidance,
        "guidance-interval": settings.guidance_interval,
        "batch-size": batches.size,
        "engine": sampler.engine,
        "reuse": settings.reuse,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        **({"provider": sampler.provider} if hasattr(sampler, "provider") else {}),
    }


def _prepare(
    parser: CommandParser, settings: SampleSettings, batches: Batches, audio: AudioConfig | None, record: dict[str, Any]
) -> tuple[Path, list[int] | None]:
    """The prepared place of the output and its missing batches; None when it is finished."""
    with parser.usage_errors():
        output, there = place_output(settings.out, SAMPLES_FOLDER, lambda path: output_at(path, batches, audio), record)
        for option, file in (("--grid", settings.grid), ("--trajectory", settings.trajectory)):
            if file is not None and file.exists() and there is None:
                raise ValueError(f"{option} {file} exists; name another file")
    for file in (settings.grid, settings.trajectory):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    missing = output.prepare(there, record)
    # A film shows the first batch, which is sampled again if a run without a film has made it.
    filmed = settings.trajectory is None or settings.trajectory.exists()
    if missing is None:
        if filmed and (settings.grid is None or settings.grid.exists()):
            return output.path, None
        if not isinstance(output, FileFolder):
            parser.error(f"{output.path} is finished, and --grid and --trajectory are made while sampling; name another --out")
        missing = []
    return output.path, missing if filmed or 0 in missing else [0, *missing]


def _run(
    sampler: AnySampler | OnnxSampler | PlanSampler,
    output: Output,
    missing: list[int],
    settings: SampleSettings,
    processes: Processes,
) -> None:
    """Sample the missing batches, write the files, and print a summary."""
    batches, share = output.batches, processes.share(missing)
    count, quiet = batches.count(missing), settings.quiet or not processes.is_first
    film = Film(settings.trajectory, len(sampler.timesteps), output.shown) if settings.trajectory is not None else None
    # Without a film, all steps may run as one graph, which is faster.
    watch = {} if film is None else {0: film.add}
    job = Job(sampler, batches, settings.guidance, watch.get, settings.guidance_interval, output.convert)
    announce(settings, sampler, f"{count_of(count, output.noun)} {_way(sampler, settings)}", quiet)
    with job_progress(output, missing, settings.quiet, processes=processes) as made:
        started = time.perf_counter()
        with collect():  # these images are not kept
            if share:
                job.warm_up(share[0])
            warm_up = time.perf_counter() - started
            if share and not sampler.runs_whole:
                again = time.perf_counter()
                job.warm_up(share[0])
                step = time.perf_counter() - again
                say(f"this will take about {duration(step * len(sampler.timesteps) * len(share))}", quiet)
        started = time.perf_counter()
        job.run(share, output, made)
        processes.wait()
        seconds = time.perf_counter() - started
    if processes.is_first:
        places = _finish(output, settings)
        if not settings.quiet:
            summary = _summary(sampler, output.noun, count, seconds, warm_up, settings) if count else None
            print(f"{summary or f'all {output.noun} were there'}; see {', '.join(map(str, places))}")


def _finish(output: Output, settings: SampleSettings) -> list[Path]:
    """Complete an output that has all batches; returns the files to look at."""
    grid = settings.grid
    if grid is None and isinstance(output, FileFolder):
        grid = output.path / output.overview
    if grid is not None:
        save_grid(grid, output)
    output.finish()
    return [path for path in (output.path, grid, settings.trajectory) if path is not None]


def _way(sampler: AnySampler | OnnxSampler | PlanSampler, settings: SampleSettings) -> str:
    """The sampler's settings, in words."""
    steps = f"of {count_of(len(sampler.timesteps), 'steps')}"
    if sampler.tolerance is not None:
        steps = f"to tolerance {sampler.tolerance:g}"
    if settings.guidance in (None, 1):
        return steps
    guidance = settings.guidance
    scales = ",".join(f"{scale:g}" for scale in (guidance if isinstance(guidance, list) else [guidance]))
    is_own = settings.guide is None and settings.guidance == sampler.config.guidance
    own = " (the model's own; --guidance 1 turns it off)" if is_own else ""
    return f"{steps}, guidance {scales}{own}"


def _summary(
    sampler: AnySampler | OnnxSampler | PlanSampler,
    noun: str,
    count: int,
    seconds: float,
    warm_up: float,
    settings: SampleSettings,
) -> str:
    steps, dtype = len(sampler.timesteps), str(sampler.dtype).removeprefix("torch.")
    made = f"{count_of(count, noun)} {_way(sampler, settings)} in {seconds:.1f} s, {sampler.engine}, {dtype}"
    rate = f"{count / seconds:.2f} {noun}/s"
    if sampler.tolerance is not None:
        spent: Any = getattr(sampler, "evaluations", None)
        return (
            f"{made}: {rate}; the last batch took {spent.float().mean():.1f} network evaluations per image (warm-up "
            f"{warm_up:.1f} s)"
        )
    interval = settings.guidance_interval
    guided = guided_steps(sampler.timesteps, settings.guidance, None if interval is None else (interval[0], interval[1]))
    evaluations = count * (steps + guided.sum())
    named = settings.spacing in SPACINGS and steps != settings.steps
    giver = "heun" if settings.solver == "heun" else settings.spacing
    note = f"{giver} gives {steps} timesteps for {settings.steps} steps\n" if named else ""
    return note + f"{made}: {rate}, {evaluations / seconds:.1f} network evaluations/s (warm-up {warm_up:.1f} s)"
