"""The progress of a job, for people."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ..jobs.outputs import Output

__all__ = ["job_progress"]


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
