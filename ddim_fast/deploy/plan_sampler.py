"""Sampling from a plan of native operators. Imports no torch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..diffusion.request import Request
from ..diffusion.trajectory import SamplerState
from ..io.progress import Bar, tell
from ..ops.noise import INITIAL_NOISE, seeded_noise_numpy
from .host import Device, host_array
from .plan_folder import GUIDED, PLAIN, PlanFolder, Run

__all__ = ["PlanSampler"]


class PlanSampler:
    """:class:`ddim_fast.Sampler` without torch and without ONNX Runtime: the same seeds give the same images, up to rounding.

    All steps of a batch are one call of the native module. The settings are those of the export. Threads may share a sampler:
    their batches take turns, each on all cores.

    Args:
        folder: written by ``python -m ddim_fast.export --to plan``.

    Attributes:
        config: the network.
        image_shape: (C, H, W) of the images.
        timesteps: as of :class:`ddim_fast.Sampler`.
        dtype: the dtype of the network's computation, by name.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file is damaged, or the processor lacks the instructions of the dtype.
        RuntimeError: the native module was not built.
    """

    engine, provider = "plan", "CPU"
    needs_one_batch_size, runs_whole, tolerance = False, True, None
    device = Device()

    def __init__(self, folder: str | Path) -> None:
        self.folder = PlanFolder.open(Path(folder))
        self.config, description = self.folder.config, self.folder.description
        self.image_shape, self.dtype = self.config.image_shape, description["dtype"]
        self.timesteps = np.array(description["timesteps"])
        self._turn = threading.Lock()
        _ = self._plain  # an unfit processor is an error now

    def sample(
        self,
        *,
        batch_size: int = 64,
        on_step: Callable[[SamplerState], None] | None = None,
        progress: bool = False,
        **request: Any,
    ) -> np.ndarray:
        """Images from seeds or from given noise; arguments as of :meth:`ddim_fast.Sampler.sample`, with arrays for tensors,
        without gradient and guidance_interval. As many images are computed at once as the export says, whatever ``batch_size``.

        Returns:
            (N, C, H, W) float32 in [-1, 1], as the network was trained; not clipped.

        Raises:
            ValueError: the arguments do not fit each other or the network, or steps are to be watched.
        """
        checked = self._request(**request)
        if on_step is not None:
            raise ValueError("the steps of a plan cannot be watched; sample with another engine")
        images = np.empty((len(checked), *self.image_shape), np.float32)
        done = 0
        with Bar(len(checked), shown=progress):
            for batch, count in checked.batches(self.folder.description["batch_size"]):
                images[done : done + count] = self._compute(batch, count)
                done += count
                tell(count, evaluations=len(self.timesteps))
        return images

    def check(self, **request: Any) -> None:
        """Raise the errors of :meth:`sample` for these arguments, without computing anything."""
        self._request(**request)

    def _compute(self, batch: Request, count: int) -> np.ndarray:
        x = seeded_noise_numpy(batch.seeds, INITIAL_NOISE, self.image_shape) if batch.x_T is None else batch.x_T
        with self._turn:
            run = self._plain if batch.guidance is None else self._guided
            run.inputs["x"][:count] = x
            if batch.seeds is not None:
                run.inputs["seeds"][:count] = batch.seeds
            if self.config.num_classes is not None:
                run.inputs["labels"][:] = self.config.num_classes  # with guidance, the first half stays without labels
                if batch.labels is not None:
                    first = len(run.inputs["labels"]) - len(run.inputs["x"])
                    run.inputs["labels"][first : first + count] = batch.labels
                run.inputs["scale"][:] = 1.0 if batch.guidance is None else batch.guidance
            run()
            return run.result[:count].copy()

    def _request(self, x_T: Any = None, **request: Any) -> Request:
        x_T = None if x_T is None else host_array(x_T)
        stochastic = self.folder.description["stochastic"]
        checked = Request.check(self.config, stochastic=stochastic, steps=len(self.timesteps), x_T=x_T, **request)
        if checked.guidance_interval is not None or checked.gradient is not None:
            raise ValueError("a plan guides by labels in every step; sample with another engine for an interval or a gradient")
        return replace(checked, guidance=None) if self.config.num_classes is None else checked

    @functools.cached_property
    def _plain(self) -> Run:
        return self.folder.run(PLAIN)

    @functools.cached_property
    def _guided(self) -> Run:
        return self.folder.run(GUIDED)
