"""A checkpoint is a folder: config.json (a :class:`UNetConfig` or :class:`AutoencoderConfig`) and model.safetensors (one tensor
a parameter); where its images mean sounds, audio.json (:class:`AudioConfig`) too.

Checkpoints of other programs are read too: what ddim_fast.interop makes of them is a :class:`Checkpoint` like any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..files import atomic_write
from .audio import AudioConfig
from .config import AutoencoderConfig, UNetConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AUTOENCODER",
    "DEFAULT_MODEL",
    "HUB_FILES",
    "Checkpoint",
    "is_state_dict",
    "load_audio",
    "load_checkpoint",
    "load_config",
    "load_timesteps",
    "local_model",
    "naming",
    "packaged_models",
    "read_json",
    "read_pickle",
    "read_safetensors",
    "resolve_model",
    "save_checkpoint",
    "save_timesteps",
    "write_json",
    "write_safetensors",
]

C = TypeVar("C", UNetConfig, AutoencoderConfig)

PACKAGED = Path(__file__).parent / "packaged"
DEFAULT_MODEL = "fashion-mnist"
_AUDIO = "audio.json"

# The folder, beside the files of a network, of the autoencoder whose latents it was trained on.
AUTOENCODER = "autoencoder"

# What a Hub repository is asked for: a checkpoint of ours, or one of diffusers. Not its pickles: most hold the weights twice.
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
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model-*-of-*.safetensors",
    )
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, before it is put into a network.

    Attributes:
        path: the file that the tensors are from, for messages.
        config: the network.
        tensors: by the names they have in the file.
        stored_name: the file's name of a tensor, given the name :class:`ddim_fast.UNet` has for it.
    """

    path: Path
    config: UNetConfig | AutoencoderConfig
    tensors: dict[str, Tensor]
    stored_name: Callable[[str], str] = str

    def state_dict(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors by the network's names, as contiguous float32.

        Args:
            shapes: those of the network's tensors, by its names.

        Raises:
            ValueError: a tensor is missing, unexpected or of another shape; the message names the file and the tensor.
        """
        import torch

        stored = {name: self.stored_name(name) for name in shapes}
        for name in sorted(set(stored.values()) ^ self.tensors.keys()):
            raise ValueError(f"{self.path}: {'unexpected' if name in self.tensors else 'missing'} tensor {name!r}")
        for name, shape in shapes.items():
            tensor = self.tensors[stored[name]]
            if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu":
                raise ValueError(f"{self.path}: tensor {stored[name]!r} is not a dense array of floating-point numbers")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self.path}: tensor {stored[name]!r} has shape {tuple(tensor.shape)}, the network needs {shape}"
                )
        return {name: self.tensors[stored[name]].detach().float().contiguous() for name in shapes}


def packaged_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
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
    raise FileNotFoundError(
        f"unknown model {text!r}: neither a folder or file nor a packaged model "
        f"({', '.join(packaged_models()) or 'there are none'})"
    )


def local_model(name: str | os.PathLike[str], **hub_options: Any) -> Path:
    """The folder or file that :func:`resolve_model` means, that of a Hub id once it is downloaded.

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
    except Exception as error:  # the hub client raises its HTTP library's exceptions too; each means the same to the user
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot get model {str(path)!r} from the Hugging Face Hub: {reason}") from error


def load_config(folder: Path, kind: type[C] = UNetConfig) -> C:
    """The configuration in ``folder``.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not JSON, or not of that kind; the message names the file and the key.
    """
    path = folder / "config.json"
    values = read_json(path)
    with naming(path):
        return kind.from_dict(values)


def load_checkpoint(path: Path, config: UNetConfig | None = None) -> Checkpoint:
    """The configuration and the tensors of a checkpoint, on the CPU.

    Args:
        path: a folder of ours, one of diffusers (:func:`ddim_fast.interop.diffusers_weights.load_diffusers`), or a file of the
            DDIM authors' code (:func:`ddim_fast.interop.ermongroup.load_ermongroup`).
        config: the network in a file of the last kind, which does not describe it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds another kind of network; the message names the file.
    """
    # Imported here, not above: other programs' formats lie a room higher, and need nothing of this package but UNetConfig.
    from ..interop.diffusers_weights import is_diffusers, load_diffusers
    from ..interop.ermongroup import load_ermongroup

    if path.is_file():
        return load_ermongroup(path, config)
    if config is not None:
        raise ValueError(f"{path} is a folder, which describes its network itself: give no config")
    if is_diffusers(path):
        return load_diffusers(path)
    weights = path / "model.safetensors"
    return Checkpoint(weights, load_config(path), read_safetensors(weights))


def load_audio(path: Path, config: UNetConfig) -> AudioConfig | None:
    """What the images of a checkpoint mean as sound; None where they are images.

    Args:
        path: the checkpoint, a folder or a file.
        config: its network.

    Raises:
        ValueError: its description is damaged or of another network; the message names the file.
    """
    file = path / _AUDIO
    if not file.is_file():
        return None
    values = read_json(file)
    with naming(file):
        audio = AudioConfig.from_dict(values)
        if audio.image_shape != config.image_shape:
            raise ValueError(f"its sounds are images of shape {audio.image_shape}, the network's are {config.image_shape}")
        if len(audio.labels or ()) != (config.num_classes or 0):
            raise ValueError(f"it names {len(audio.labels or ())} classes, the network has {config.num_classes or 0}")
    return audio


def save_checkpoint(
    folder: Path, config: UNetConfig | AutoencoderConfig, state: dict[str, Tensor], audio: AudioConfig | None = None
) -> None:
    """Write ``folder/config.json``, ``folder/model.safetensors`` and, for sounds, ``folder/audio.json``, each one whole or not
    at all. Timesteps that were fitted to earlier weights in that folder are removed: they are not for these."""
    folder.mkdir(parents=True, exist_ok=True)
    _timesteps_file(folder).unlink(missing_ok=True)
    if audio is not None:
        write_json(folder / _AUDIO, audio.to_dict())
    write_safetensors(folder / "model.safetensors", state)
    write_json(folder / "config.json", config.to_dict())


def load_timesteps(path: Path, total: int) -> dict[int, list[int]] | None:
    """The timesteps that were fitted to a checkpoint, by number of steps; None where there are none.

    Args:
        path: the checkpoint, a folder or a file.
        total: T, the number of training timesteps.

    Raises:
        ValueError: their file is damaged; the message names it.
    """
    file = _timesteps_file(path)
    if not file.is_file():
        return None
    stored = read_json(file).get("timesteps")
    with naming(file):
        if not isinstance(stored, dict) or not all(
            _is_falling(run, total) and steps == str(len(run)) for steps, run in stored.items()
        ):
            raise ValueError(f"not timesteps, falling in 0..{total - 1}, by their number")
    return {int(steps): run for steps, run in stored.items()}


def save_timesteps(path: Path, timesteps: dict[int, list[int]], calibration: dict[str, Any]) -> Path:
    """Write fitted timesteps beside a checkpoint; returns the file.

    Args:
        calibration: what they were fitted to, to be read by people.
    """
    file = _timesteps_file(path)
    lines = ",\n".join(f'  "{steps}": {json.dumps(run)}' for steps, run in timesteps.items())
    atomic_write(file, f'{{\n "calibration": {json.dumps(calibration)},\n "timesteps": {{\n{lines}\n }}\n}}\n'.encode())
    return file


def _timesteps_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.timesteps.json") if path.is_file() else path / "timesteps.json"


def _is_falling(run: Any, total: int) -> bool:
    if not isinstance(run, list) or not run or not all(type(t) is int and 0 <= t < total for t in run):
        return False
    return all(a > b for a, b in pairwise(run))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a ValueError is about the content of ``path``, and says so."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    _require_file(path)
    with naming(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values``, whole or not at all."""
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _require_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(path, save(tensors, metadata={"format": "pt"}))


def read_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, numbers, text, and containers of these. A pickle can hold code as well;
    then it is refused, and none of the code is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds more than data.
    """
    import torch

    _require_file(path)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that are then refused
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises almost anything, and torch's message recommends unsafe loading
            code = re.search(r"GLOBAL (\S+)", str(error))
            why = f"it holds {code[1]}, which is not data and was not executed" if code else "not a whole file of tensors"
            raise ValueError(f"{path}: {why}") from None


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` holds the tensors of a network, by name."""
    from torch import Tensor

    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a checkpoint: it has no {path.name}")
