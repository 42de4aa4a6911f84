"""A sampling job: batches of images written to disk, within the available memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from tqdm import tqdm

from ..diffusion.trajectory import SamplerState
from ..io.pictures import to_uint8
from ..io.progress import count_of
from ..io.stopping import signals
from .outputs import Batches, Output

if TYPE_CHECKING:
    from ..deploy.onnx_sampler import OnnxSampler
    from ..deploy.plan_sampler import PlanSampler
    from ..diffusion.latent import LatentSampler, LatentState
    from ..diffusion.sampler import Sampler

__all__ = ["Job", "JobStep"]

T = TypeVar("T")


@dataclass(frozen=True)
class JobStep:
    """One step of the sampler in a job.

    Attributes:
        batch: the number of the batch.
        call: the number of the batch's part that is sampled at once, from 0.
        calls: the number of parts: 1, unless memory ran out.
        state: the sampler's state after the step.
    """

    batch: int
    call: int
    calls: int
    state: SamplerState | LatentState


class Job:
    """Samples batches; halves the number of images sampled at once when memory runs out.

    Args:
        sampler: the sampler of the images.
        batches: the images to make.
        guidance: scale of classifier-free guidance, or None.
        watch: from the number of a batch to a callback for each of its steps, or None; only without a callback can an engine
            run the whole loop in one go. When memory runs out, a batch starts again from its first step.
        guidance_interval: the timesteps that guidance is limited to, or None.
        convert: converts the images of a batch, (n, C, H, W) in [-1, 1]: see :meth:`ddim_fast.jobs.outputs.Output.convert`.
    """

    def __init__(
        self,
        sampler: Sampler | LatentSampler | OnnxSampler | PlanSampler,
        batches: Batches,
        guidance: float | list[float] | None = None,
        watch: Callable[[int], Callable[[JobStep], None] | None] = lambda k: None,
        guidance_interval: Sequence[int] | None = None,
        convert: Callable[[Any], np.ndarray] = to_uint8,
    ) -> None:
        self.sampler, self.batches, self.watch, self.convert = sampler, batches, watch, convert
        self._guidance: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval}
        self._at_once = batches.size

    def warm_up(self, k: int) -> None:
        """Run one step of batch k as a warm-up: it compiles code and starts libraries."""
        whole_on_cpu = (
            self.sampler.runs_whole and self.sampler.device.type == "cpu"
        )  # recorded by its first run, or when loaded
        if whole_on_cpu or self.sampler.engine == "onnx" or self.sampler.tolerance is not None:
            return

        def compute() -> None:
            seeds, labels = (None if part is None else part[: self._at_once] for part in self._filled(k))
            request = {"seeds": seeds, "labels": labels, **self._guidance}
            if self.sampler.runs_whole:  # all steps are one graph, which has no parts to try
                self.sampler.sample(**request, batch_size=self._at_once)
            else:
                sampler: Any = self.sampler
                next(sampler.trajectory(**request))
            device: Any = self.sampler.device
            if device.type == "cuda":
                import torch

                torch.cuda.synchronize(device)

        self._within_memory(compute)

    def pictures(self, k: int) -> np.ndarray:
        """The converted images of batch k: (n, H, W, C) uint8, or sounds.

        Raises:
            RuntimeError: there is not enough memory for a single image.
            ValueError: the images are not finite.
        """

        def compute() -> np.ndarray:
            seeds, labels = self._filled(k)
            images: Any = self.sampler.sample(  # a tensor or an array
                seeds=seeds,
                labels=labels,
                **self._guidance,
                batch_size=self._at_once,
                on_step=self._reporter(k, len(seeds)),
            )
            images = images[: len(self.batches[k][0])]
            if not (abs(images) < float("inf")).all():
                raise ValueError("the samples are not finite; try --dtype float32")
            return self.convert(images)

        return self._within_memory(compute)

    def run(self, ks: Sequence[int], output: Output, on_batch: Callable[[int], None]) -> None:
        """Make batches and write them to ``output``, each while the next one is made.

        Args:
            ks: the batches.
            output: where they go.
            on_batch: called with the number of each batch when it is made.
        """
        # One thread hides the writing of up to some 1500 PNGs a second; on two cores, four did hardly better.
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for k in signals.each(ks, "batch"):
                pictures = self.pictures(k)
                if written is not None:
                    written.result()  # no more than one batch waits, and an error of writing is raised here
                written = writer.submit(output.write, k, pictures)
                on_batch(k)
            if written is not None:
                written.result()

    def _filled(self, k: int) -> tuple[list[int], list[int] | None]:
        """Seeds and labels of batch k. Compiled and captured code is for one batch size, so a smaller last batch is filled up
        with its last image."""
        seeds, labels = self.batches[k]
        missing = max(0, self._at_once - len(seeds)) if self.sampler.needs_one_batch_size else 0
        return [*seeds, *[seeds[-1]] * missing], None if labels is None else [*labels, *[labels[-1]] * missing]

    def _reporter(self, k: int, count: int) -> Callable[[SamplerState | LatentState], None] | None:
        on_step = self.watch(k)
        if on_step is None:
            return None
        calls, call = -(-count // self._at_once), -1

        def report(state: SamplerState | LatentState) -> None:
            nonlocal call
            call += state.step == 0
            on_step(JobStep(k, call, calls, state))

        return report

    def _within_memory(self, compute: Callable[[], T]) -> T:
        """The result of ``compute``, retried with half as many images at once each time memory runs out."""
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            # Only after the error is gone: its traceback holds the tensors of the attempt.
            gc.collect()
            if self.sampler.device.type == "cuda":
                import torch

                torch.cuda.empty_cache()
            if self._at_once == 1:
                raise RuntimeError(f"out of memory: {self.sampler.device} has too little for a single image of this network")
            self._at_once //= 2
            tqdm.write(f"out of memory: continuing with {count_of(self._at_once, 'images')} per network call", file=sys.stderr)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Torch's host allocator has no error class of its own."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "not enough memory")
    )
