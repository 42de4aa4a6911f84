"""Exports made at their first use and kept in the user's cache."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from .. import __version__
from ..io.files import cache_folder
from ..models.checkpoint import AUTOENCODER, resolve_model
from .folder import is_export

__all__ = ["ready_export"]


def ready_export(model: str | Path) -> Path:
    """The folder of an export of ``model``: itself if it is one, otherwise one in the cache, made now if missing.

    The cache is ``onnx`` in :func:`ddim_fast.io.files.cache_folder`. Exports of other weights, or by another version of this
    package, are not used.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is a model of latents, whose autoencoder cannot be exported.
        RuntimeError: it has to be exported, and a package for that is not installed.
    """
    path = Path(resolve_model(model))
    if is_export(path):
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {str(model)!r}: give a folder that `python -m ddim_fast.export --to onnx` has written"
        )
    if (path / AUTOENCODER).is_dir():
        raise ValueError(f"{model} is a model of an autoencoder's latents: sample it with torch, not by ONNX Runtime")
    folder = cache_folder() / "onnx" / f"{path.stem}-{_digest(path)[:16]}"
    if is_export(folder):
        return folder
    try:
        from ..models.unet import UNet
        from .onnx_export import export_onnx
    except ImportError as error:
        raise RuntimeError(
            f"{str(model)!r} is exported to ONNX at its first use, which needs {error.name or error}: pip install "
            f"{'torch' if error.name == 'torch' else repr('ddim_fast[onnx]')}, or export on another machine "
            "(python -m ddim_fast.export --to onnx) and give the folder"
        ) from None
    network = UNet.from_pretrained(path)
    print(f"exporting {model} to ONNX, once: {folder}", file=sys.stderr)
    try:
        export_onnx(folder, network, source=str(model))
    except OSError:
        if not is_export(folder):  # unless another process was faster
            raise
    return folder


def _digest(path: Path) -> str:
    """The checksum of a checkpoint's files and of this package's version."""
    digest = hashlib.sha256(__version__.encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
