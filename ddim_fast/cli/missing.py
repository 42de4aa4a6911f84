"""Packages that are not installed."""

from __future__ import annotations

import os
import sys
from types import TracebackType

__all__ = ["describe_missing", "name_missing_packages"]

# Packages whose pip name differs from their import name.
_PIP_NAMES = {"PIL": "pillow", "skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}


def describe_missing(error: ModuleNotFoundError) -> str:
    """The missing package and how to install it; the error's own message where it has one, or where a module of this package is
    missing."""
    module = (error.name or "").partition(".")[0]
    if module in ("", "ddim_fast"):
        return str(error)
    package = _PIP_NAMES.get(module, module)
    return f"this needs {package}, which is not installed: pip install {package}"


def name_missing_packages() -> None:
    """End a command with one line instead of a traceback where its imports fail before :func:`ddim_fast.cli.parser.run_command`
    runs. Other programs are not affected."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None or not spec.name.startswith("ddim_fast."):
        return
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError) and not os.environ.get("DDIM_FAST_TRACEBACK"):
            print(f"error: {describe_missing(error)}", file=sys.stderr)
        else:
            show(kind, error, traceback)

    sys.excepthook = hook
