"""Installed packages, devices and operator implementations: ``python -m ddim_fast.doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

from . import __version__
from .cli.parser import CommandParser, run_command

_EXAMPLES = """\
  python -m ddim_fast.doctor
  DDIM_FAST_BACKEND=reference python -m ddim_fast.doctor
"""

_PACKAGES = ("torch", "triton", "numpy", "diffusers", "onnx", "onnxruntime", "onnxruntime-gpu")

# Extras for developers, or repeating another extra for other machines.
_OTHER_EXTRAS = {"dev", "peers", "onnx-gpu"}


def main() -> None:
    CommandParser("doctor", "List packages, devices and the implementation that serves each operator.", _EXAMPLES).parse_args()
    for title, lines in _sections():
        print(f"{title}:")
        width = max((len(name) for name, _ in lines), default=0)
        for name, value in lines:
            print(f"  {name:{width}}  {value}")


def _sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """By title, the names and values of a section."""
    yield (
        "versions",
        [("ddim_fast", __version__), ("Python", platform.python_version())]
        + [(name, found) for name in _PACKAGES if (found := _version(name))],
    )
    yield "processor", _processor()
    if not _version("torch"):
        yield "torch", [("torch", "not installed: only models exported to ONNX can be sampled")]
    else:
        yield "GPU", _gpu()
        import torch

        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            yield f"operators on {device}", _operators(device)
    yield "extras that are missing", _missing_extras() or [("none", "")]


def _missing_extras() -> list[tuple[str, str]]:
    """By extra, its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("ddim_fast") or ():
        if match := re.match(r"([\w.-]+).*extra == .([\w-]+)", requirement):
            package, extra = match.groups()
            if extra not in _OTHER_EXTRAS and not _version(package):
                missing.setdefault(extra, []).append(package)
    return [(extra, f"{', '.join(lacks)}: pip install 'ddim_fast[{extra}]'") for extra, lacks in missing.items()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> list[tuple[str, str]]:
    from .ops import native

    lines = [("machine", f"{platform.machine()}, {os.cpu_count()} cores"), ("model", _model_name())]
    if native.module is None:
        return [*lines, ("C++ operators", str(native.why_not))]
    served = f"for {native.module.instruction_set()}"
    if os.environ.get("DDIM_FAST_CPU"):
        served += f" (DDIM_FAST_CPU={os.environ['DDIM_FAST_CPU']})"
    if native.module.conv3x3_has_bf16():
        served += ", with products of bfloat16"
    return [*lines, ("C++ operators", served)]


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _gpu() -> list[tuple[str, str]]:
    import torch

    from .ops import native

    if not torch.cuda.is_available():
        return [("none", "torch sees no CUDA device")]
    lines = [
        (str(i), f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}")
        for i in range(torch.cuda.device_count())
    ]
    return [*lines, ("CUDA", f"{torch.version.cuda}; csrc/ was built {'with' if native.has_cuda else 'without'} it")]


def _operators(device: str) -> list[tuple[str, str]]:
    """By operator and dtype, the implementation that serves a typical call, and why the others do not."""
    import torch

    from .ops.serving import serving

    return [
        (f"{operator} {str(dtype).removeprefix('torch.')}", choice)
        for dtype in (torch.float32, torch.bfloat16)
        for operator, choice in serving(torch.device(device), dtype).items()
    ]


if __name__ == "__main__":
    run_command(main)
