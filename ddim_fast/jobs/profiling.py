"""Profiles of sampling runs, by torch.profiler."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..io.files import atomic_write
from ..ops.recording import recorded_operators
from ..ops.torch_private import named_cpp_kernels
from .time_table import RUN, SOLVER_STEP, Profile, time_table

if TYPE_CHECKING:
    from ..diffusion.latent import LatentSampler
    from ..diffusion.sampler import Sampler

__all__ = ["profile_sampling"]


def profile_sampling(sampler: Sampler | LatentSampler, trace: Path, *, seeds: Sequence[int], **request: Any) -> Profile:
    """Sample one batch twice: first to warm up, then under torch.profiler.

    No other thread of the process may use this package meanwhile. The given sampler itself compiles and captures nothing.

    Args:
        sampler: a sampler of fixed steps.
        trace: the file of the Chrome trace, for Perfetto or chrome://tracing; it is overwritten.
        seeds: the seeds of the batch.
        request: other arguments of :meth:`ddim_fast.Sampler.sample`, except ``batch_size`` and ``on_step``.

    Raises:
        ValueError: the sampler has a tolerance, or the request is wrong.
    """
    if sampler.tolerance is not None:
        raise ValueError(
            "a profile needs steps that all images share, but with a tolerance each image takes its own; use fixed steps"
        )
    fresh, device = sampler.with_new_engine(), sampler.device
    on_gpu = device.type == "cuda"

    def sample() -> None:
        fresh.sample(seeds=seeds, batch_size=len(seeds), **request)
        if on_gpu:
            torch.cuda.synchronize(device)

    _record_solver(fresh.solver)
    with recorded_operators() as served, contextlib.nullcontext() if on_gpu else named_cpp_kernels():
        sample()
        with _profiler(on_gpu) as profiler, record_function(RUN):
            sample()
    wall, rows = time_table(_export(profiler, trace), on_gpu)
    dtype = str(sampler.dtype).removeprefix("torch.")
    title = f"a batch of {len(seeds)} in {len(sampler.timesteps)} steps, {sampler.engine}, {dtype}, {device}: {wall:.1f} ms"
    return Profile(title, wall, rows, on_gpu, {operator: sorted(served[operator]) for operator in sorted(served)})


def _record_solver(solver: Any) -> None:
    """Mark the solver's steps as a range of the profile, if they are not compiled."""
    step = solver.step

    def recorded(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return step(*arguments)
        with record_function(SOLVER_STEP):
            return step(*arguments)

    solver.step = recorded


def _profiler(on_gpu: bool) -> profile:
    return profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])


def _export(profiler: Any, trace: Path) -> list[dict[str, Any]]:
    """Write the trace, whole or not at all; returns its events."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(file)
        data = Path(file).read_bytes()
    trace.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(trace, data)
    return json.loads(data)["traceEvents"]
