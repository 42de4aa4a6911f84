"""A checkpoint is a folder: config.json (:class:`UNetConfig`) and model.safetensors (one tensor a parameter)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import atomic_write
from .config import UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_MODEL", "load_checkpoint", "load_config", "packaged_models", "resolve_model", "save_checkpoint"]

PACKAGED = Path(__file__).parent / "packaged"
DEFAULT_MODEL = "fashion-mnist"


def packaged_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(p.parent.name for p in PACKAGED.glob("*/config.json")))


def resolve_model(name: str | os.PathLike[str]) -> str:
    """The folder of a packaged model or a local checkpoint; a Hub id (``owner/name``) is returned as it is.

    Raises:
        FileNotFoundError: ``name`` is none of them.
    """
    text = os.fspath(name)
    if text in packaged_models():
        return str(PACKAGED / text)
    if text and Path(text).is_dir():
        return text
    if re.fullmatch(r"[\w-]+/[\w.-]+", text) and not Path(text).parent.is_dir():
        return text
    raise FileNotFoundError(
        f"unknown model {text!r}: neither a folder nor a packaged model ({', '.join(packaged_models()) or 'there are none'})"
    )


def load_config(folder: Path) -> UNetConfig:
    """The configuration in ``folder``.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, or not a :class:`UNetConfig`; the message names the file and the key.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return UNetConfig.from_dict(values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def load_checkpoint(folder: Path) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The configuration and the tensors in ``folder``, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = load_config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no model.safetensors")
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def save_checkpoint(folder: Path, config: UNetConfig, state: dict[str, Tensor]) -> None:
    """Write ``folder/config.json`` and ``folder/model.safetensors``, each one whole or not at all."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    atomic_write(folder / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())
