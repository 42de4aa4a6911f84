"""The output of a running command: a first line, then a progress bar."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..io.processes import Processes
from ..io.progress import Bar, count_of

if TYPE_CHECKING:
    import torch

    from ..data.resizing import Resizer
    from ..jobs.outputs import Batches, Output
    from .options import SamplerSettings
    from .settings import SampleSettings

__all__ = ["announce", "count_of", "describe_model", "job_progress", "notice", "say", "say_resized"]


_PATIENCE, _SILENCE = 1.0, 4.0  # seconds


def say(text: str, quiet: bool) -> None:
    """Print a line of progress on stderr, above a bar that is shown; results go to stdout."""
    if not quiet:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def notice(text: str, quiet: bool = False) -> Iterator[None]:
    """Inside, work of more than a second prints a line naming it, where stderr is a terminal; then one every four seconds.

    Args:
        quiet: print nothing.
    """
    done = threading.Event()

    def tell() -> None:
        if done.wait(_PATIENCE):
            return
        print(text, file=sys.stderr, flush=True)
        begun = time.monotonic() - _PATIENCE
        while not done.wait(_SILENCE):
            print(f"{text}: {time.monotonic() - begun:.0f} s so far", file=sys.stderr, flush=True)

    if not quiet and sys.stderr.isatty():
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def say_resized(resizer: Resizer, quiet: bool) -> None:
    """Print a line where pictures were resized to the model's size."""
    if resizer.line is not None:
        say(resizer.line, quiet)


def describe_model(name: str, networks: Sequence[Any], dtype: str, device: torch.device) -> str:
    """A model's name, size and dtype, in words.

    Args:
        networks: its modules.
    """
    parameters = sum(p.numel() for network in networks for p in network.parameters())
    size = f"{parameters / 1e6:.1f}M" if parameters >= 1e6 else f"{parameters:,}"
    return f"{name}: {size} parameters, {dtype} on {device}"


def announce(settings: SamplerSettings | SampleSettings, sampler: Any, items: str, quiet: bool) -> None:
    """Print a command's first line: model, parameters, dtype, device, engine, operator implementations and items. Where
    ``--compile`` did not compile or did not use bfloat16, a second line says why.

    Args:
        settings: the command's settings, which name the model.
        sampler: a sampler of torch or of ONNX Runtime.
        items: the result, as "60 images of 20 steps".
    """
    if quiet:
        return
    dtype = str(sampler.dtype).removeprefix("torch.")
    if hasattr(sampler, "networks"):
        from ..ops.serving import serving_line

        model = describe_model(settings.model, sampler.networks, dtype, sampler.device)
        is_plan = sampler.engine == "captured" and sampler.device.type == "cpu"
        by = "a plan of C++ operators" if is_plan else f"operators by {serving_line(sampler.device, sampler.dtype)}"
        say(f"{model}, {sampler.engine}, {by}; {items}", quiet)
        if settings.compile and (reasons := _reasons(settings, sampler)):
            say(f"--compile: {'; '.join(reasons)}", quiet)
    else:
        by = "ONNX Runtime" if sampler.engine == "onnx" else "C++ operators"
        say(f"{settings.model}: {dtype} by {by} on {sampler.provider}; {items}", quiet)


def _reasons(settings: SamplerSettings | SampleSettings, sampler: Any) -> list[str]:
    """The reasons why a run with --compile is not compiled or not in bfloat16, where no option asked for that."""
    from ..ops.devices import bf16_is_fast

    reasons, device = [], sampler.device
    if sampler.tolerance is not None:
        reasons.append("eager, since each image takes steps of its own")
    elif settings.engine == "auto" and sampler.engine == "eager" and device.type == "cpu":
        reasons.append("eager, since this package's C++ operators are faster here than torch.compile")
    if settings.dtype == "auto" and not bf16_is_fast(device):
        reasons.append(f"float32, since this {'processor' if device.type == 'cpu' else 'GPU'} is not fast at bfloat16")
    return reasons


@contextlib.contextmanager
def job_progress(
    output: Output, missing: Sequence[int], quiet: bool, *, noun: str | None = None, processes: Processes | None = None
) -> Iterator[Callable[[int], None]]:
    """A progress bar for a job that fills ``output``; an interrupted job prints how to continue.

    Args:
        missing: the batches to make.
        noun: the name of its items (default: the output's).
        processes: the processes that share the batches; None is this one alone.

    Yields:
        A function to call with the number of each finished batch.
    """
    processes = Processes() if processes is None else processes
    batches, noun = output.batches, noun or output.noun
    total = len(batches.seeds)
    there = total - batches.count(missing)
    if there and processes.is_first:
        say(f"{output.path} holds {_progress(batches, missing, noun)}; continuing", quiet)
    try:
        with Bar(total, noun, there=there, shown=processes.is_first and not quiet) as bar:
            yield lambda k: bar.made(there + processes.add_done(batches.count([k])))
            bar.made(total)
    except KeyboardInterrupt:
        if processes.is_first:
            done = _progress(batches, output.missing(), noun)
            print(f"stopped: {output.path} holds {done}; the same command continues it", file=sys.stderr)
        raise


def _progress(batches: Batches, missing: Sequence[int], noun: str) -> str:
    """The number of finished images, as "40 of 60 images"."""
    return f"{len(batches.seeds) - batches.count(missing)} of {count_of(len(batches.seeds), noun)}"
