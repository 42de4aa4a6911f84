"""The option --profile: where a sampling run's time goes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.processes import Processes
from .parser import CommandParser

__all__ = ["PROFILE_HELP", "check_profile_options", "print_profile"]

PROFILE_HELP = (
    "sample the first batch twice and profile the second run: a table, and trace.json for ui.perfetto.dev in the folder --out "
    "(default: profile); no images are written"
)


def check_profile_options(parser: CommandParser, options: Mapping[str, Any]) -> None:
    """A usage error where --profile contradicts other options."""
    if not options["profile"]:
        return
    for name, given in {
        "--engine onnx": options["engine"] == "onnx",
        "--engine plan": options["engine"] == "plan",
        "--tolerance": options["tolerance"] is not None,
        "--grid": options["grid"] is not None,
        "--trajectory": options["trajectory"] is not None,
        "an .npz file as --out": options["out"] is not None and options["out"].suffix.lower() == ".npz",
        "torchrun": Processes().count > 1,
    }.items():
        if given:
            parser.error(f"--profile needs fixed steps in torch in one process and writes no images; leave out {name}")


def print_profile(
    sampler: Any, batch: tuple[Sequence[int], Sequence[int] | None], folder: Path, quiet: bool, **guidance: Any
) -> None:
    """Profile a batch.

    Args:
        sampler: a sampler of torch.
        batch: seeds and labels to sample.
        folder: the folder for the trace.
        quiet: print nothing.
        guidance: as of :meth:`ddim_fast.Sampler.sample`.
    """
    from ..jobs.profiling import profile_sampling

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler prints lines of its own
    trace = folder / "trace.json"
    profile = profile_sampling(sampler, trace, seeds=batch[0], labels=batch[1], **guidance)
    if not quiet:
        print(f"{profile}\n{trace} lists every operator; open it in ui.perfetto.dev")
