"""Checkpoint folders: config.json (a :class:`UNetConfig` or :class:`AutoencoderConfig`), model.safetensors (one tensor per
parameter; or several files and their index) and, for a network of sounds, audio.json (:class:`AudioConfig`).

ddim_fast.models.formats reads the checkpoints of other programs.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..io.files import atomic_write, errors_name_file, read_json, write_json
from ..ops.scalars import is_finite
from .audio import AudioConfig
from .config import AutoencoderConfig, UNetConfig
from .json_dataclass import JsonDataclass

if TYPE_CHECKING:
    from torch import Tensor

    from .weights import Checkpoint

__all__ = [
    "AUDIO",
    "AUTOENCODER",
    "DEFAULT_MODEL",
    "HUB_FILES",
    "SNAPSHOTS",
    "WEIGHTS",
    "load_audio",
    "load_calibration",
    "load_checkpoint",
    "load_coefficients",
    "load_config",
    "load_timesteps",
    "local_model",
    "packaged_models",
    "resolve_model",
    "save_checkpoint",
    "save_timesteps",
    "timesteps_file",
]

C = TypeVar("C", bound=JsonDataclass)

# The key of the class names in audio.json of version 0.1.
_FORMER_NAMES = "labels"

PACKAGED = Path(__file__).parent / "packaged"
DEFAULT_MODEL = "cifar10-64"
AUDIO = "audio.json"

# The name of the weights' file, without its suffix.
WEIGHTS = "model"

# The subfolder with the autoencoder of a latent network.
AUTOENCODER = "autoencoder"

# The subfolder with snapshots of the averaged weights during training.
SNAPSHOTS = "ema"

# The files to download from a Hub repository of this package or of diffusers. No pickles: they repeat the weights.
HUB_FILES = tuple(
    folder + name
    for folder in ("", "unet/", "scheduler/", f"{AUTOENCODER}/")
    for name in (
        "model_index.json",
        "config.json",
        "timesteps.json",
        "audio.json",
        "scheduler_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-*-of-*.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-*-of-*.safetensors",
    )
)


def packaged_models() -> tuple[str, ...]:
    """Names of the packaged models."""
    return tuple(sorted(p.parent.name for p in PACKAGED.glob("*/config.json")))


def resolve_model(name: str | os.PathLike[str]) -> str:
    """The folder of a packaged model, or a local folder or file; a Hub id (``owner/name``) is returned as it is.

    Raises:
        FileNotFoundError: ``name`` is none of them.
    """
    text = os.fspath(name)
    if text in packaged_models():
        return str(PACKAGED / text)
    if text and Path(text).exists():
        return text
    if re.fullmatch(r"[\w-]+/[\w.-]+", text) and not Path(text).parent.is_dir():
        return text
    close = difflib.get_close_matches(text, packaged_models(), n=1)
    raise FileNotFoundError(
        f"unknown model {text!r}: neither a folder or file nor a packaged model "
        f"({', '.join(packaged_models()) or 'there are none'})" + (f"; did you mean {close[0]!r}?" if close else "")
    )


def local_model(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """:func:`resolve_model` as a path; a Hub id is downloaded.

    Args:
        hub_options: for a Hub id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        FileNotFoundError: there is no such model.
    """
    path = Path(resolve_model(name))
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES), **hub_options))
    except Exception as error:  # the hub client also raises its HTTP library's exceptions; all mean the same to the user
        reason = re.sub(r"^Got: \w+: ", "", str(error).strip().splitlines()[0])
        raise FileNotFoundError(
            f"cannot get model {str(path)!r} from the Hugging Face Hub: {reason} (a local folder is named by its path)"
        ) from error


def load_config(folder: Path, kind: type[C] = UNetConfig) -> C:  # type: ignore[assignment]
    """The configuration in ``folder``.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, or of another kind of network; the message names the file and the key.
    """
    path = folder / "config.json"
    values = read_json(path)
    with errors_name_file(path):
        if kind is UNetConfig and "latent_channels" in values:
            raise ValueError("this describes an autoencoder, not a diffusion model; name the folder of a model of its latents")
        if kind is not UNetConfig and "prediction_type" in values:
            raise ValueError("this describes a diffusion model, not an autoencoder; name the folder of one")
        config = kind.from_dict(values)
    audio = folder / AUDIO
    if isinstance(config, UNetConfig) and config.class_names is None and audio.is_file():
        names = read_json(audio).get(_FORMER_NAMES)
        with errors_name_file(audio):
            return dataclasses.replace(config, class_names=names)
    return config


def load_checkpoint(path: Path, config: UNetConfig | None = None) -> Checkpoint:
    """The configuration and the tensors of a checkpoint, on the CPU.

    Args:
        path: a folder of ours, one of diffusers (:func:`ddim_fast.models.formats.diffusers.load_diffusers`), or a file of the
            DDIM authors' code (:func:`ddim_fast.models.formats.ermongroup.load_ermongroup`).
        config: the network of such a file, which does not describe it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds another kind of network; the message names the file.
    """
    from .formats.diffusers import is_diffusers, load_diffusers
    from .formats.ermongroup import load_ermongroup
    from .weights import Checkpoint, read_weights

    if path.is_file():
        return load_ermongroup(path, config)
    if config is not None:
        raise ValueError(f"{path} is a folder, which describes its network itself: give no config")
    if is_diffusers(path):
        return load_diffusers(path)
    config = load_config(path)
    weights, tensors = read_weights(path, WEIGHTS)
    return Checkpoint(weights, config, tensors)


def load_audio(path: Path, config: UNetConfig) -> AudioConfig | None:
    """The audio.json of a checkpoint; None for a network of images.

    Raises:
        ValueError: it is damaged or does not fit ``config``; the message names the file.
    """
    file = path / AUDIO
    if not file.is_file():
        return None
    values = read_json(file)
    values.pop(_FORMER_NAMES, None)  # which load_config reads
    with errors_name_file(file):
        audio = AudioConfig.from_dict(values)
        if audio.image_shape != config.image_shape:
            raise ValueError(f"its sounds are images of shape {audio.image_shape}, the network's are {config.image_shape}")
    object.__setattr__(audio, "_network", config)
    return audio


def save_checkpoint(
    folder: Path,
    config: UNetConfig | AutoencoderConfig,
    state: dict[str, Tensor],
    audio: AudioConfig | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write ``folder/config.json``, ``folder/model.safetensors`` and, for sounds, ``folder/audio.json``, each whole or not at
    all. Timesteps fitted to earlier weights in that folder are removed.

    Args:
        max_shard_size: the size limit of a file of weights, see :func:`ddim_fast.models.weights.write_weights`; None writes
            one.
    """
    from .weights import write_weights  # imports torch, which a configuration does not need

    folder.mkdir(parents=True, exist_ok=True)
    timesteps_file(folder).unlink(missing_ok=True)
    if audio is not None:
        write_json(folder / AUDIO, audio.to_dict())
    write_weights(folder, WEIGHTS, state, max_shard_size)
    write_json(folder / "config.json", config.to_dict())


def load_timesteps(path: Path, total: int) -> dict[str, dict[int, list[int]]] | None:
    """The timesteps fitted to a checkpoint, by solver and number of steps; None if there are none.

    Args:
        total: T, the number of training timesteps.

    Raises:
        ValueError: their file is damaged; the message names it.
    """
    file = timesteps_file(path)
    if not file.is_file():
        return None
    stored = read_json(file).get("timesteps")
    with errors_name_file(file):
        if not isinstance(stored, dict) or not all(_are_runs(runs, total) for runs in stored.values()):
            raise ValueError(f"not timesteps, falling in 0..{total - 1}, by solver and their number")
    return {solver: {int(steps): run for steps, run in runs.items()} for solver, runs in stored.items()}


def load_coefficients(path: Path) -> dict[int, list[list[float]]]:
    """The rows of the solver ``fitted`` of a checkpoint, by their number; the timesteps are :func:`load_timesteps`'s.

    Raises:
        ValueError: their file is damaged; the message names it.
    """
    file = timesteps_file(path)
    if not file.is_file():
        return {}
    stored = read_json(file)
    tables, timesteps = stored.get("coefficients", {}), stored.get("timesteps")
    with errors_name_file(file):
        if not isinstance(tables, dict) or not all(_is_table(table, steps) for steps, table in tables.items()):
            raise ValueError("not the coefficients of a fitted solver, 9 numbers a step, by the number of steps")
        if not isinstance(timesteps, dict) or tables.keys() != timesteps.get("fitted", {}).keys():
            raise ValueError("a fitted solver has timesteps and coefficients for the same numbers of steps")
    return {int(steps): table for steps, table in tables.items()}


def load_calibration(path: Path) -> dict[str, Any]:
    """The settings of the fits of a checkpoint, for people; empty where nothing was fitted."""
    file = timesteps_file(path)
    calibration = read_json(file).get("calibration") if file.is_file() else None
    return calibration if isinstance(calibration, dict) else {}


def save_timesteps(
    path: Path,
    timesteps: dict[str, dict[int, list[int]]],
    calibration: dict[str, Any],
    coefficients: dict[int, list[list[float]]] | None = None,
) -> Path:
    """Write what was fitted beside a checkpoint; returns the file.

    Args:
        timesteps, coefficients: as :func:`load_timesteps` and :func:`load_coefficients` return them.
        calibration: the settings of the fits, for people.
    """
    file = timesteps_file(path)
    runs = ",\n".join(f'  "{solver}": {{\n{_lines(by_steps)}\n  }}' for solver, by_steps in timesteps.items())
    parts = [f' "calibration": {json.dumps(calibration)}', f' "timesteps": {{\n{runs}\n }}']
    if coefficients:
        parts.append(f' "coefficients": {{\n{_lines(coefficients)}\n }}')
    atomic_write(file, ("{\n" + ",\n".join(parts) + "\n}\n").encode())
    return file


def _lines(by_steps: Mapping[int, Any]) -> str:
    return ",\n".join(f'   "{steps}": {json.dumps(value)}' for steps, value in by_steps.items())


def timesteps_file(path: Path) -> Path:
    """The file of the timesteps fitted to a checkpoint."""
    return path.with_name(f"{path.name}.timesteps.json") if path.is_file() else path / "timesteps.json"


def _are_runs(runs: Any, total: int) -> bool:
    return isinstance(runs, dict) and all(_is_falling(run, total) and steps == str(len(run)) for steps, run in runs.items())


def _is_table(table: Any, steps: str) -> bool:
    if not isinstance(table, list) or steps != str(len(table)):
        return False
    return all(isinstance(row, list) and len(row) == 9 and all(map(is_finite, row)) for row in table)


def _is_falling(run: Any, total: int) -> bool:
    are_timesteps = isinstance(run, list) and run and all(type(t) is int and 0 <= t < total for t in run)
    return bool(are_timesteps) and all(a > b for a, b in pairwise(run))
