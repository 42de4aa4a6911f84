"""Sample images: ``python -m ddim_fast.sample --compile --steps 20``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .cli import MODEL_HELP, CommandParser, parse_integers, parse_positive, run_command
from .devices import bf16_is_fast, pick_device
from .diffusion.sampler import Sampler, SamplerState
from .diffusion.solvers import SOLVERS
from .diffusion.step import SIGMA_HAT
from .diffusion.timesteps import SPACINGS
from .media import image_format, image_grid, save_gif, save_image, to_uint8
from .models.checkpoint import DEFAULT_MODEL, resolve_model
from .models.unet import UNet

_EXAMPLES = """\
  python -m ddim_fast.sample --compile --steps 20
  python -m ddim_fast.sample --class 9 --guidance 2 --seeds 0-31 --out boots
  python -m ddim_fast.sample --solver unipc --steps 10 --spacing log-snr
  python -m ddim_fast.sample --eta 1 --steps 100 --trajectory film.gif
  python -m ddim_fast.sample --model runs/cifar10 --seeds 7,11,100-107 --grid grid.png
"""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _parser() -> CommandParser:
    p = CommandParser("sample", "Sample images from a diffusion model.", _EXAMPLES)
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--steps", metavar="S", type=int, default=20, help="number of steps")
    p.add_argument("--eta", metavar="X", type=_eta, default=0.0, help=f"0: DDIM, 1: DDPM's variance, between, or {SIGMA_HAT}")
    p.add_argument("--spacing", metavar="NAME|LIST", default="quadratic", help=_SPACING_HELP)
    p.add_argument("--solver", choices=SOLVERS, default="ddim", help="how a step is made")
    p.add_argument("--clip", metavar="R", type=float, help="clip the predicted image to [-R, R] at each step (default: never)")
    p.add_argument("--seeds", metavar="LIST", type=parse_integers, default="0-59", help="one image a seed: 0-63 or 1,5,7-9")
    p.add_argument("--batch-size", metavar="N", type=parse_positive, default=64, help="images a network call")
    p.add_argument("--class", dest="classes", metavar="LIST", default="all", help=_CLASS_HELP)
    p.add_argument("--guidance", metavar="W", type=float, help="classifier-free guidance scale (default: none)")
    p.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    p.add_argument("--device", metavar="DEVICE", default="auto", help="auto, cpu or cuda")
    p.add_argument("--dtype", choices=["auto", *_DTYPES], default="auto", help=_DTYPE_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, default=Path("samples"), help="folder for the images, a PNG a seed")
    p.add_argument("--grid", metavar="FILE", type=Path, help="all of them in one picture (default: grid.png in --out)")
    p.add_argument("--trajectory", metavar="FILE.gif", type=Path, help="a film of the first batch, from noise to images")
    p.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return p


_SPACING_HELP = f"how the timesteps are chosen: {', '.join(SPACINGS)}, or the timesteps themselves, as 999,500,0"
_DTYPE_HELP = "what the network computes in; auto: with --compile bfloat16 where the device is fast at it, otherwise float32"
_CLASS_HELP = "for a class-conditional model: class numbers, used in turn; 'all', or 'none' for unconditional samples"


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    with parser.usage_errors():
        device = pick_device(arguments.device)
        folder = resolve_model(arguments.model)
    model = UNet.from_pretrained(folder).to(device)
    with parser.usage_errors():
        sampler = Sampler(
            model,
            steps=arguments.steps,
            eta=arguments.eta,
            spacing=_spacing(arguments.spacing),
            solver=arguments.solver,
            engine="compiled" if arguments.compile else "eager",
            clip_sample_range=arguments.clip,
            dtype=_dtype(arguments.dtype, arguments.compile, device),
        )
        labels = _labels(arguments.classes, arguments.seeds, model.config.num_classes)
        request = {"labels": labels, "guidance": arguments.guidance}
        sampler.trajectory(seeds=arguments.seeds, **request)  # checks the request before anything is written or computed
        if arguments.trajectory is not None and arguments.trajectory.suffix.lower() != ".gif":
            parser.error(f"--trajectory writes a GIF; got {str(arguments.trajectory)!r}")
        grid = arguments.grid or arguments.out / "grid.png"
        image_format(grid)
    for folder in {arguments.out, grid.parent, (arguments.trajectory or grid).parent}:
        folder.mkdir(parents=True, exist_ok=True)
    _run(sampler, request, grid, arguments)


def _run(sampler: Sampler, request: dict, grid: Path, arguments: argparse.Namespace) -> None:
    """Sample, write the files, and say what was done."""
    seeds, steps = arguments.seeds, len(sampler.timesteps)
    batch = min(arguments.batch_size, len(seeds))
    started = time.perf_counter()
    # One step of a first batch, thrown away: it compiles what is compiled and starts what is started once.
    first = {"seeds": seeds[:batch], **request, "labels": None if request["labels"] is None else request["labels"][:batch]}
    next(sampler.trajectory(**first))
    _wait(sampler.device)
    warm_up = time.perf_counter() - started

    frames: list[np.ndarray] = []
    total = -(-len(seeds) // batch) * steps
    with tqdm(total=total, unit="step", disable=arguments.quiet, file=sys.stderr) as bar:

        def on_step(state: SamplerState) -> None:
            bar.update()
            if arguments.trajectory is not None and bar.n <= steps:
                frames.append(image_grid(state.x))

        started = time.perf_counter()
        images = sampler.sample(seeds=seeds, batch_size=batch, on_step=on_step, **request)
        _wait(sampler.device)
        seconds = time.perf_counter() - started

    if not torch.isfinite(images).all():
        raise ValueError("the samples are not finite; try --dtype float32")
    for seed, picture in zip(seeds, to_uint8(images), strict=True):
        save_image(arguments.out / f"{seed:06d}.png", picture)
    scale = max(1, 64 // images.shape[-1])
    save_image(grid, image_grid(images), scale)
    if arguments.trajectory is not None:
        save_gif(arguments.trajectory, frames, scale)
    if not arguments.quiet:
        dtype = str(sampler.dtype).removeprefix("torch.")
        evaluations = len(seeds) * steps * (2 if request["guidance"] not in (None, 1) else 1)
        if steps != arguments.steps and arguments.spacing in SPACINGS:
            print(f"{arguments.spacing} makes {steps} timesteps of {arguments.steps} steps")
        print(
            f"{len(seeds)} images of {steps} steps in {seconds:.1f} s, {dtype}: {len(seeds) / seconds:.2f} images/s, "
            f"{evaluations / seconds:.1f} network evaluations/s (warm-up {warm_up:.1f} s); pictures in {arguments.out}, {grid}"
        )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _labels(classes: str, seeds: list[int], num_classes: int | None) -> list[int] | None:
    """One label a seed. ``all`` gives seed s class s mod num_classes; a list is used in turn."""
    if num_classes is None or classes == "none":
        if classes not in ("all", "none"):
            raise ValueError("--class: the model is unconditional")
        return None
    if classes == "all":
        return [seed % num_classes for seed in seeds]
    try:
        chosen = parse_integers(classes)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--class: {error}") from None
    return [chosen[i % len(chosen)] for i in range(len(seeds))]


def _dtype(name: str, compiled: bool, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if compiled and bf16_is_fast(device) else torch.float32
    return _DTYPES[name]


def _spacing(text: str) -> str | list[int]:
    return [int(t) for t in text.split(",")] if all(t.strip().isdecimal() for t in text.split(",")) else text


def _eta(text: str) -> float | str:
    if text == SIGMA_HAT:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number in [0, 1] nor {SIGMA_HAT!r}") from None


if __name__ == "__main__":
    run_command(main)
