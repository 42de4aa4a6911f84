"""What a command says while it works: a line at its start, then a bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..io.processes import Processes
from ..io.progress import Bar

if TYPE_CHECKING:
    from ..jobs.outputs import Batches, Output

__all__ = ["announce", "count_of", "job_progress", "progress_of", "say"]


def say(text: str, quiet: bool) -> None:
    """A line of progress, on stderr: results are on stdout. A bar that is there stays below it."""
    if not quiet:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


def count_of(count: int, noun: str) -> str:
    """So many of what ``noun`` names in the plural, as "1 image" and "2 images"."""
    return f"{count} {noun if count != 1 else noun.removesuffix('s')}"


def announce(name: str, sampler: Any, items: str, quiet: bool) -> None:
    """A command's first line: model, parameters, device, dtype, engine, what serves the operators, and what is made.

    Args:
        name: the model, as of ``--model``.
        sampler: one of torch, or of ONNX Runtime.
        items: what is made, as "60 images of 20 steps".
    """
    if quiet:
        return
    dtype = str(sampler.dtype).removeprefix("torch.")
    if hasattr(sampler, "networks"):
        from .operators import served_by

        parameters = sum(p.numel() for network in sampler.networks for p in network.parameters())
        how = f"{parameters / 1e6:.1f}M parameters, on {sampler.device}, {dtype}, {sampler.engine}"
        served = served_by(sampler.device, dtype)
        say(f"{name}: {how}, operators by {served}; {items}", quiet)
    else:
        say(f"{name}: by ONNX Runtime on {sampler.provider}, {dtype}; {items}", quiet)


@contextlib.contextmanager
def job_progress(
    output: Output, missing: Sequence[int], quiet: bool, *, noun: str | None = None, processes: Processes | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar of a job that fills ``output``, and a line on how to go on where it is interrupted.

    Args:
        missing: the batches to make.
        noun: what its items are called (default: as the output calls them).
        processes: among which the batches are divided; None is this one alone.

    Yields:
        A function to call with the number of each batch that is made.
    """
    processes = Processes() if processes is None else processes
    batches, noun = output.batches, noun or output.noun
    total = len(batches.seeds)
    there = total - batches.count(missing)
    if there and processes.is_first:
        say(f"{output.path} holds {progress_of(batches, missing)} {noun}; going on", quiet)
    try:
        with Bar(total, noun, there=there, shown=processes.is_first and not quiet) as bar:
            yield lambda k: bar.made(there + processes.add_done(batches.count([k])))
            bar.made(total)
    except KeyboardInterrupt:
        if processes.is_first:
            done = progress_of(batches, output.missing())
            print(f"stopped: {output.path} holds {done} {noun}; the same command goes on with it", file=sys.stderr)
        raise


def progress_of(batches: Batches, missing: Sequence[int]) -> str:
    """How many images there are, as "40 of 60"."""
    return f"{len(batches.seeds) - batches.count(missing)} of {len(batches.seeds)}"
