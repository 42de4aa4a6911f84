"""Export to a plan of native operators, which samples without torch and without ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .. import __version__
from ..diffusion.denoiser import Denoiser
from ..diffusion.loop import Loop, Run
from ..diffusion.request import Request
from ..diffusion.sampler import Sampler
from ..diffusion.solvers import FITTED
from ..diffusion.timesteps import ADAPTIVE
from ..engine import inference
from ..engine.captured_cpu import CapturedOnCpu, Recording
from ..engine.plan import Buffer
from ..io.files import atomic_folder, atomic_write, write_json
from ..models.unet import UNet
from ..models.unet_blocks import Conv3x3
from ..ops import native
from ..ops.torch_private import storage_id
from .folder import CHECKSUMS, PLAN, write_checksums
from .plan_folder import FORMAT, GUIDED, PLAIN, WEIGHTS

__all__ = ["export_plan"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@inference()
def export_plan(
    folder: Path,
    model: UNet,
    *,
    steps: int | None = 20,
    eta: float | str = 0.0,
    spacing: str | Sequence[int] = "quadratic",
    solver: str = "ddim",
    clip_sample_range: float | None = None,
    dtype: str = "float32",
    batch_size: int = 1,
    source: str = "model",
    command: str | None = None,
    stage: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> None:
    """Write ``folder``, which :class:`ddim_fast.deploy.PlanSampler` samples from on any CPU that this package's C++ operators
    run on.

    Args:
        folder: new or empty.
        model: the network, on the CPU, in float32.
        steps, eta, spacing, solver, clip_sample_range: of the sampler, as of :class:`ddim_fast.Sampler`.
        dtype: dtype of the network's computation, float32 or bfloat16; the processor of the export needs its instructions, too.
        batch_size: images that are computed at once.
        source, command, stage: as of :func:`ddim_fast.deploy.onnx_export.export_onnx`.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: an option is out of range, or the network has layers that no native operator computes; the message names it.
    """
    if model.audio is not None:
        raise ValueError(f"{source} makes sounds, and a plan cannot hold their format; sample it with torch")
    if dtype not in _DTYPES:
        raise ValueError(f"a plan is in {' or '.join(_DTYPES)}, not {dtype}")
    if native.module is None:
        raise ValueError(f"a plan is recorded with the C++ operators: {native.why_not}")
    spacing = ADAPTIVE if solver == FITTED else spacing
    denoiser = Denoiser(model, dtype=_DTYPES[dtype])
    sampler = Sampler(denoiser, steps=steps, eta=eta, spacing=spacing, solver=solver, clip_sample_range=clip_sample_range)
    weights = _Weights(denoiser, model)
    with stage("recording the run"):
        runs = {PLAIN: weights.describe(_record(sampler, batch_size, None))}
        if model.config.num_classes is not None:
            runs[GUIDED] = weights.describe(_record(sampler, batch_size, 2.0))
    listed = spacing if isinstance(spacing, str) else [int(t) for t in spacing]
    settings = {
        "steps": steps if isinstance(spacing, str) else None,
        "eta": eta,
        "spacing": listed,
        "solver": solver,
        "clip": clip_sample_range,
    }
    description = {
        "format": FORMAT,
        "settings": settings,
        "dtype": dtype,
        "stochastic": sampler.solver.stochastic,
        "batch_size": batch_size,
        "timesteps": sampler.timesteps.tolist(),
        "runs": runs,
        "versions": {"ddim_fast": __version__, "torch": version("torch"), "python": platform.python_version()},
    }
    with stage(f"writing {PLAN} and {WEIGHTS}"), atomic_folder(folder) as place:
        write_json(place / "config.json", model.config.to_dict())
        # No indentation: runs are long lists of calls.
        atomic_write(place / PLAN, json.dumps(description).encode())
        atomic_write(place / WEIGHTS, safetensors.torch.save(weights.tensors))
        (place / "README.md").write_text(_card(source, command, description, model), encoding="utf-8")
        write_checksums(place)


def _record(sampler: Sampler, batch_size: int, guidance: float | None) -> Recording:
    """A run over tensors of these shapes; of classes, the embeddings of all are among them, and labels name their rows."""
    classes, x_T = sampler.config.num_classes, torch.zeros(batch_size, *sampler.image_shape)
    seeds = torch.zeros(batch_size, dtype=torch.int64)
    # So many labels that their embeddings are laid down by class.
    labels = None if classes is None else torch.zeros(classes + 1, dtype=torch.int64)
    request = Request(seeds, x_T=x_T, labels=labels, guidance=guidance)
    engine = CapturedOnCpu()
    loop = Loop(sampler.denoiser, sampler.solver, engine)
    run = loop.prepare(request, sampler.timesteps, sampler.solver.table)
    inputs = run.inputs
    if labels is not None:
        rows = torch.zeros(batch_size * (1 if guidance is None else 2), dtype=torch.int64)
        inputs = inputs._replace(conditions=inputs.conditions._replace(network=(inputs.conditions.network[0], rows)))
    loop.last(Run(inputs))
    (recording,) = engine.recordings.values()
    return recording


class _Weights:
    """What plans read and a file keeps, each tensor once.

    Attributes:
        tensors: by their names in the file.
    """

    def __init__(self, denoiser: Denoiser, model: UNet) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._sources: list[Tensor] = []  # while they live, their storages' numbers are theirs
        modules = dict(model.named_modules())
        # By their storage's number: the weights from which a convolution's were prepared, and its tile.
        self._prepared: dict[int, tuple[nn.Parameter, int]] = {}
        for name, module in denoiser.network_modules():
            if isinstance(module, Conv3x3) and module.prepared is not None:
                own: Any = modules[name]
                self._prepared[storage_id(module.prepared[0])] = own.weight, 4 if len(module.prepared[0]) == 36 else 2

    def describe(self, recording: Recording) -> dict[str, Any]:
        """A run for plan.json; its weights are added to the tensors."""
        inputs = recording.inputs
        network = inputs.conditions.network
        named = {"x": inputs.x, "seeds": inputs.seeds, "scale": inputs.conditions.scale}
        named["labels"] = network[1] if len(network) > 1 else None
        dynamic = {storage_id(t): name for name, t in named.items() if t is not None}
        segments = []
        for buffer in recording.plan.buffers:
            name = dynamic.get(storage_id(buffer.tensor)) if buffer.tensor is not None else None
            segments.append(self._segment(buffer) if name is None else {"input": name})
        return {
            "bytes": recording.plan.bytes,
            "result": recording.plan.result_offset,
            "guided": inputs.conditions.scale is not None,
            "segments": segments,
            "calls": [list(call) for call in recording.plan.calls],
        }

    def _segment(self, buffer: Buffer) -> dict[str, Any]:
        tensor: Any = buffer.tensor
        dtype = str(tensor.dtype).removeprefix("torch.")
        if storage_id(tensor) in self._prepared:
            weight, tile = self._prepared[storage_id(tensor)]
            return {"kind": "conv3x3", "weight": self._name(weight, weight.float()), "dtype": dtype, "tile": tile}
        if buffer.origin is not None:
            return {"kind": "product", "weight": self._name(buffer.origin, buffer.origin.float().flatten(1)), "dtype": dtype}
        whole = tensor.new_empty(0).set_(tensor.untyped_storage())  # views of it are named by their places
        return {"kind": "raw", "weight": self._name(whole, whole)}

    def _name(self, source: Tensor, values: Tensor) -> str:
        key = storage_id(source), source.storage_offset(), tuple(source.shape), source.stride()
        if key not in self._names:
            self._names[key] = str(len(self._names))
            self.tensors[self._names[key]] = values.detach().clone().contiguous()
            self._sources.append(source)
        return self._names[key]


def _card(source: str, command: str | None, description: dict[str, Any], model: UNet) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    chosen = ", ".join(f"{name} {'none' if value is None else value}" for name, value in description["settings"].items())
    versions = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    return "\n".join(
        [
            f"# {source}, as a plan",
            "",
            f"A diffusion network ({parameters / 1e6:.1f}M parameters) and its sampler as calls of ddim_fast's C++ operators.",
            f"They compute in {description['dtype']}, {description['batch_size']} at a time.",
            f"The sampler: {len(description['timesteps'])} steps; {chosen}.",
            "",
            f"`sha256sum -c {CHECKSUMS}` checks the files.",
            "",
            "```python",
            "from ddim_fast.deploy import PlanSampler  # needs numpy and safetensors, not torch",
            "",
            'images = PlanSampler("THIS FOLDER").sample(seeds=range(4))',
            "```",
            "",
            f"{f'By `{command}`, with' if command else 'With'} {versions}.",
            "",
        ]
    )
