"""Sampling from an export to ONNX, by ONNX Runtime. Imports no torch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.guidance import apply_guidance, guided_steps
from ..diffusion.request import Request
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import DDIMUpdate, State, make_solver, network_timesteps
from ..diffusion.timesteps import choose_fitted, select_timesteps
from ..diffusion.trajectory import SamplerState
from ..io.files import errors_name_file
from ..io.progress import Bar, tell
from ..models.checkpoint import DEFAULT_MODEL
from ..ops.ddim_step_numpy import ddim_step_numpy
from ..ops.noise import INITIAL_NOISE, seeded_noise_numpy
from ..ops.scalars import plain
from .cache import ready_export
from .folder import SAMPLER, UNET, ExportFolder
from .host import Device, host_array
from .session import Session, pick_provider

__all__ = ["AS_EXPORTED", "OnnxSampler"]

AS_EXPORTED = "as exported"


class OnnxSampler:
    """:class:`ddim_fast.Sampler` without torch: the same seeds give the same images, up to rounding.

    With the settings of the export, sampling is one call of ONNX Runtime. With other settings, or when the steps are watched,
    the exported network is called once per step. Threads may share a sampler: their calls of ONNX Runtime take turns, each on
    all cores.

    Args:
        model: a folder written by ``python -m ddim_fast.export --to onnx``; or a packaged model or a checkpoint, which is
            exported at its first use (this needs torch) and kept in the user's cache.
        steps, eta, spacing, solver, clip_sample_range: as of :class:`ddim_fast.Sampler`; each defaults to the export's.
        provider: ONNX Runtime's execution provider, ``cuda`` or ``cpu`` for instance; None is the fastest that starts here.
        cuda_graph: whether, on CUDA, steps are replayed as a CUDA graph.

    Attributes:
        config: the network.
        image_shape: (C, H, W) of the images.
        timesteps: as of :class:`ddim_fast.Sampler`.
        provider: ONNX Runtime's name of the network's execution provider.
        dtype: the dtype of the network's computation, by name.
        runs_whole: whether all steps are one call, unless they are watched.

    Raises:
        FileNotFoundError: there is no such model, or a file of it is missing.
        ValueError: a file is damaged, a setting is out of range, or the provider is missing or cannot run the model.
    """

    engine = "onnx"
    needs_one_batch_size = True
    device = Device()
    tolerance = None  # its steps are fixed

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        *,
        steps: int | str | None = AS_EXPORTED,
        eta: float | str = AS_EXPORTED,
        spacing: str | Sequence[int] = AS_EXPORTED,
        solver: str = AS_EXPORTED,
        clip_sample_range: float | str | None = AS_EXPORTED,
        provider: str | None = None,
        cuda_graph: bool = True,
    ) -> None:
        self.provider = pick_provider(provider)
        self.folder = ExportFolder.open(ready_export(model))
        self.config = config = self.folder.config
        self.image_shape = config.image_shape
        self.dtype: str = self.folder.schedule["dtype"]
        if self.dtype == "bfloat16" and self.provider == "CPUExecutionProvider":
            raise ValueError(
                f"{self.folder.path} is a bfloat16 model, which ONNX Runtime cannot run on a CPU; export it as float32 or int8"
            )
        given = {"steps": steps, "eta": eta, "spacing": spacing, "solver": solver, "clip": clip_sample_range}
        exported = self.folder.settings
        own = {name for name, value in given.items() if isinstance(value, str) and value == AS_EXPORTED}
        chosen: dict[str, Any] = {name: exported[name] if name in own else plain(value) for name, value in given.items()}
        if not isinstance(spacing := chosen["spacing"], str):
            listed = isinstance(spacing, Sequence) or hasattr(spacing, "tolist")
            chosen |= {"spacing": [plain(t) for t in spacing] if listed else spacing, "steps": None}
        self.runs_whole = chosen == exported and (self.folder.path / SAMPLER).exists()
        self._cuda_graph = cuda_graph
        # An error in the export's own settings is reported as a damaged file.
        with errors_name_file(self.folder.path) if own == given.keys() else contextlib.nullcontext():
            schedule = NoiseSchedule.from_config(config)
            spacing, solver = chosen["spacing"], chosen["solver"]
            spacing, coefficients = choose_fitted(spacing, solver, chosen["steps"], self.folder)
            self.timesteps = network_timesteps(solver, select_timesteps(schedule, chosen["steps"], spacing))
            levels = schedule.levels(self.timesteps)
            self.solver = make_solver(solver, levels, chosen["eta"], config.prediction_type, chosen["clip"], coefficients)

    def sample(
        self,
        *,
        batch_size: int = 64,
        on_step: Callable[[SamplerState], None] | None = None,
        progress: bool = False,
        **request: Any,
    ) -> np.ndarray:
        """Images from seeds or from given noise; arguments as of :meth:`ddim_fast.Sampler.sample`, with arrays for tensors, and
        no gradient. With a guidance interval, or a scale for each step, the network is called once per step.

        Returns:
            (N, C, H, W) float32 in [-1, 1], as the network was trained; not clipped.

        Raises:
            ValueError: neither or mismatched seeds, x_T and labels, or a label out of range.
        """
        checked = self._request(**request)
        images = np.empty((len(checked), *self.config.image_shape), np.float32)
        done = 0
        with Bar(len(checked), shown=progress):
            for batch, count in checked.batches(batch_size):
                part = images[done : done + count]
                if (
                    self.runs_whole
                    and on_step is None
                    and batch.guidance_interval is None
                    and not isinstance(batch.guidance, tuple)
                ):
                    part[:] = self._whole(batch)
                    tell(count, evaluations=len(self.timesteps))
                else:
                    for state in self._steps(batch):
                        if on_step is not None:
                            on_step(state)
                    part[:] = state.x
                done += count
        return images

    def trajectory(self, **request: Any) -> Iterator[SamplerState]:
        """The states of one batch, one after each step; arguments as of :meth:`sample`, without batch_size and on_step."""
        return self._steps(self._request(**request))

    def check(self, **request: Any) -> None:
        """Raise the errors of :meth:`sample` for these arguments, without computing anything."""
        self._request(**request)

    def load(self) -> None:
        """Read and check the model of :meth:`sample` now, not at its first image.

        Raises:
            ValueError: a file is damaged.
        """
        _ = self._sampler if self.runs_whole else self._network

    def _whole(self, batch: Request) -> np.ndarray:
        x = self._start(batch)
        inputs: dict[str, Any] = {"seeds": batch.seeds, "x_T": x}
        if self.config.num_classes is not None:
            guidance = 1.0 if batch.guidance is None else batch.guidance
            inputs |= {"labels": batch.labels, "guidance": np.array(guidance, np.float32)}
        return self._sampler(inputs, x.shape)

    def _steps(self, batch: Request) -> Iterator[SamplerState]:
        count, solver = len(batch), self.solver
        if not np.issubdtype(self.timesteps.dtype, np.integer):
            raise ValueError(
                "spacings karras and exponential lie between the timesteps that an exported network takes; export the model "
                "with such a --spacing, and sample it with its own settings, one scale of guidance and no on_step"
            )
        inputs: dict[str, Any] = {}
        guided_at = guided_steps(self.timesteps, batch.guidance, batch.guidance_interval)
        scales = np.full(len(self.timesteps), 1.0 if batch.guidance is None else batch.guidance, np.float32)
        state: State = (self._start(batch),) * (1 + solver.memory)
        for i, (timestep, guided) in enumerate(zip(self.timesteps.tolist(), guided_at, strict=True)):
            x = state[0]
            if self.config.num_classes is not None:
                none = np.full_like(batch.labels, self.config.num_classes)
                inputs["labels"] = np.concatenate([none, batch.labels]) if guided else batch.labels
            inputs["x"] = np.concatenate([x, x]) if guided else x
            inputs["timesteps"] = np.full(len(inputs["x"]), timestep)
            output = self._network(inputs, inputs["x"].shape)
            if guided:
                output = apply_guidance(output[:count], output[count:], scales[i])
            if isinstance(solver, DDIMUpdate):
                seeds = batch.seeds if solver.stochastic else None
                state = (ddim_step_numpy(x, output, solver.table[i], solver.clip, seeds=seeds, step=i),)
            else:
                state = solver.combine(state, output, solver.table[i])
            tell(count / len(self.timesteps))
            yield SamplerState(i, timestep, state[0], (solver, x, output))

    @functools.cached_property
    def _sampler(self) -> Session:
        return Session(self.folder.model(SAMPLER), self.provider)

    @functools.cached_property
    def _network(self) -> Session:
        return Session(self.folder.model(UNET), self.provider, cuda_graph=self._cuda_graph)

    def _request(self, x_T: Any = None, **request: Any) -> Request:
        """The checked arguments of :meth:`sample`. Missing labels of a class-conditional network are "no class"; missing seeds
        are 0, as nothing is drawn from them."""
        x_T = None if x_T is None else host_array(x_T)
        checked = Request.check(self.config, stochastic=self.solver.stochastic, steps=len(self.timesteps), x_T=x_T, **request)
        count, classes, labels = len(checked), self.config.num_classes, checked.labels
        if labels is None and classes is not None:
            labels = np.full(count, classes, np.int64)
        return replace(checked, seeds=np.zeros(count, np.int64) if checked.seeds is None else checked.seeds, labels=labels)

    def _start(self, batch: Request) -> np.ndarray:
        """The noise to start from, drawn only when needed, for a request may be large."""
        return seeded_noise_numpy(batch.seeds, INITIAL_NOISE, self.config.image_shape) if batch.x_T is None else batch.x_T
