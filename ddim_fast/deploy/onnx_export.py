"""Export to ONNX: a folder with the network, the whole sampler and their description."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto

from .. import __version__
from ..diffusion.sampler import Sampler
from ..diffusion.solvers import FITTED
from ..diffusion.timesteps import ADAPTIVE
from ..io.files import atomic_folder, write_json
from ..models.checkpoint import save_timesteps
from ..models.unet import UNet
from .card import model_card
from .folder import SAMPLER, SCHEDULE, UNET, write_checksums
from .network import export_network
from .sampler_graph import sampler_model, unet_model

__all__ = ["DTYPES", "OPTIMISATIONS", "export_onnx"]

DTYPES = ("float32", "float16", "bfloat16", "int8")
OPTIMISATIONS = ("cuda",)

# Opset 21 adds GroupNormalization, which ONNX Runtime expands; 22 adds bfloat16 convolutions. Below 18 the noise lacks bitwise
# operators; versions above 23 are untested.
OPSET, BFLOAT16_OPSET, OPSETS = 20, 22, range(18, 24)

# The size limit of a protobuf message, less a reserve for its other parts. Larger weights go to a file of their own.
LARGEST = 2**31 - 2**24


def export_onnx(
    folder: Path,
    model: UNet,
    *,
    steps: int | None = 20,
    eta: float | str = 0.0,
    spacing: str | Sequence[int] = "quadratic",
    solver: str = "ddim",
    clip_sample_range: float | None = None,
    dtype: str = "float32",
    opset: int | None = None,
    unroll: bool = False,
    optimize: str | None = None,
    source: str = "model",
    command: str | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Write ``folder``: ``unet.onnx`` (:func:`ddim_fast.deploy.sampler_graph.unet_model`), ``sampler.onnx``
    (:func:`ddim_fast.deploy.sampler_graph.sampler_model`), and their description.

    Args:
        folder: new or empty.
        model: the network, on the CPU, in float32.
        steps, eta, spacing, solver, clip_sample_range: of the whole sampler, as of :class:`ddim_fast.Sampler`.
        dtype: dtype of the network's computation: float32, float16, bfloat16; or int8, for 8-bit convolutions on a CPU,
            calibrated on a few trajectories.
        opset: the version of ONNX's operators; None is 20, or 22 for bfloat16, whose convolutions begin there.
        unroll: write the steps one after the other, in place of a loop.
        optimize: ``cuda`` fuses for ONNX Runtime's CUDA provider: the models then run nowhere else.
        source: the name of the model, for people.
        command: the command line, for people.
        stage: from the name of a part of the work to a context around it, to show the progress.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: an option is out of range or does not fit another; the message names it.
    """
    if model.audio is not None:
        raise ValueError(f"{source} makes sounds, and an ONNX export cannot hold their format; sample it with torch")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if optimize not in (None, *OPTIMISATIONS):
        raise ValueError(f"optimize must be one of {', '.join(OPTIMISATIONS)}, or None; got {optimize!r}")
    if optimize == "cuda" and dtype not in ("float32", "float16"):
        raise ValueError(f"optimize='cuda' is for float32 and float16; ONNX Runtime's fused operators do not take {dtype}")
    least = BFLOAT16_OPSET if dtype == "bfloat16" else OPSETS[0]
    opset = max(OPSET, least) if opset is None else opset
    if not least <= opset <= OPSETS[-1]:
        raise ValueError(f"opset must be from {least} to {OPSETS[-1]} for {dtype}; got {opset}")
    spacing = ADAPTIVE if solver == FITTED else spacing
    sampler = Sampler(
        model, steps=steps, eta=eta, spacing=spacing, solver=solver, clip_sample_range=clip_sample_range, engine="eager"
    )
    settings = {
        "steps": steps if isinstance(spacing, str) else None,
        "eta": eta,
        "spacing": spacing if isinstance(spacing, str) else [int(t) for t in spacing],
        "solver": solver,
        "clip": clip_sample_range,
    }
    with atomic_folder(folder) as place:
        # int8 and the fusions for CUDA, with their own float16, start from float32.
        exact = torch.float32 if dtype == "int8" or optimize == "cuda" else getattr(torch, dtype)
        with stage("translating the network to ONNX"):
            embeddings, denoise = export_network(model, exact, opset)
            conditions = _conditions(model, sampler.timesteps)
        if dtype == "int8":
            from .quantise import calibration, quantise

            with stage("calibrating 8-bit convolutions on sampled images"):
                denoise = quantise(denoise, calibration(sampler, conditions))
        if optimize == "cuda":
            from .optimise import fuse_for_cuda

            with stage("fusing operators for CUDA"):
                denoise = fuse_for_cuda(denoise, half=dtype == "float16")
        with stage(f"writing and checking {UNET} and {SAMPLER}"):
            _save(unet_model(model.config, embeddings, denoise), place / UNET)
            _save(sampler_model(model.config, denoise, conditions, sampler.solver, unroll=unroll), place / SAMPLER)
        schedule = {
            "settings": settings,
            "dtype": dtype,
            "opset": opset,
            "unroll": unroll,
            "optimize": optimize,
            "timesteps": sampler.timesteps.tolist(),
            "alphas_cumprod": sampler.schedule.levels(sampler.timesteps).tolist(),
            "coefficients": sampler.solver.table.tolist(),
            "versions": _versions(),
        }
        write_json(place / "config.json", model.config.to_dict())
        write_json(place / SCHEDULE, schedule)
        if model.fitted_timesteps is not None:
            save_timesteps(place, model.fitted_timesteps, {"model": source}, model.fitted_coefficients)
        card = model_card(model.config, schedule, source, command, sum(p.numel() for p in model.parameters()))
        (place / "README.md").write_text(card, encoding="utf-8")
        write_checksums(place)


@torch.no_grad()
def _conditions(model: UNet, timesteps: np.ndarray) -> np.ndarray:
    """The embeddings of each timestep and label: (S, classes and no class, K), or (S, 1, K) without classes."""
    steps = torch.from_numpy(timesteps)
    if model.config.num_classes is None:
        return model.condition(steps)[:, None].numpy()
    rows = torch.arange(model.config.num_classes + 1)
    return torch.stack([model.condition(t.expand(len(rows)), rows) for t in steps]).numpy()


def _save(model: ModelProto, path: Path) -> None:
    """Check a model and write it."""
    external = model.ByteSize() > LARGEST
    onnx.save(
        model,
        path,
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )
    onnx.checker.check_model(str(path), full_check=not external)


def _versions() -> dict[str, str]:
    """The versions of the programs that made the files."""
    packages: dict[str, Any] = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
    with contextlib.suppress(ModuleNotFoundError):  # needed for int8 only
        packages["onnxruntime"] = version("onnxruntime")
    return {"ddim_fast": __version__, **packages, "python": platform.python_version()}
