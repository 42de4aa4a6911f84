"""The progress of a job, for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ..io.processes import Processes
    from ..jobs.outputs import Batches, Output
    from ..jobs.sampling import JobStep

__all__ = ["StepProgress", "job_progress", "progress_of"]


@contextlib.contextmanager
def job_progress(output: Output, missing: Sequence[int], what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar of a job that fills ``output``, and a line on how to go on where it is interrupted.

    Args:
        missing: the batches to make.
        what: they hold, such as ``images``.

    Yields:
        A function to call with the number of each batch that is made.
    """
    total = len(output.batches.seeds)
    there = total - output.batches.count(missing)
    if there and not quiet:
        print(f"{output.folder} holds {there} of {total} {what}; going on")
    try:
        with tqdm(total=total, initial=there, unit=f" {what}", disable=quiet) as bar:
            yield lambda k: bar.update(output.batches.count([k]))
    except KeyboardInterrupt:
        there = total - output.batches.count(output.missing())
        print(f"stopped: {output.folder} holds {there} of {total} {what}; the same command goes on with it", file=sys.stderr)
        raise


class StepProgress:
    """A bar that counts the images of all processes, and moves with each step of this one's sampler."""

    def __init__(self, output: Output, steps: int, missing: int, processes: Processes, quiet: bool) -> None:
        self._batches, self._noun, self._steps, self._processes = output.batches, output.noun, steps, processes
        self._there = self._done = len(output.batches.seeds) - missing
        self._quiet = quiet or not processes.is_first

    def __enter__(self) -> StepProgress:
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


def progress_of(batches: Batches, missing: list[int]) -> str:
    """How many images there are, as "40 of 60"."""
    return f"{len(batches.seeds) - batches.count(missing)} of {len(batches.seeds)}"
