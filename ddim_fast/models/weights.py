"""Files of a network's tensors, safetensors or pickles, whole or sharded. Nothing in them is ever executed."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from ..io.files import atomic_write, errors_name_file, one_line, read_json, require_file, write_json
from .config import AutoencoderConfig, UNetConfig

__all__ = [
    "Checkpoint",
    "check_finite",
    "is_dense",
    "is_state_dict",
    "read_pickle",
    "read_safetensors",
    "read_shards",
    "read_weights",
    "write_safetensors",
    "write_weights",
]

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        path: the file of the tensors, for messages.
        config: the network.
        tensors: by their names in the file.
        stored_name: from :class:`ddim_fast.UNet`'s name of a tensor to the file's.
    """

    path: Path
    config: UNetConfig | AutoencoderConfig
    tensors: dict[str, Tensor]
    stored_name: Callable[[str], str] = str

    def network(self, kind: type[Network]) -> Network:
        """The network of class ``kind``, in eval mode, on the CPU, in float32. Errors as of :meth:`state_dict`."""
        with torch.device("meta"):
            model = kind(self.config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        model.load_state_dict(self.state_dict(shapes), assign=True)
        return model.eval()

    def state_dict(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors by the network's names, as contiguous float32.

        Args:
            shapes: the network's tensors and their shapes, by name.

        Raises:
            ValueError: a tensor is missing, unexpected, of another shape or not finite; the message names the file and the
                tensor.
        """
        stored = {name: self.stored_name(name) for name in shapes}
        for name in sorted(set(stored.values()) ^ self.tensors.keys()):
            raise ValueError(f"{self.path}: {'unexpected' if name in self.tensors else 'missing'} tensor {name!r}")
        for name, shape in shapes.items():
            tensor = self.tensors[stored[name]]
            if not is_dense(tensor):
                raise ValueError(f"{self.path}: tensor {stored[name]!r} is not a dense array of floating-point numbers")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self.path}: tensor {stored[name]!r} has shape {tuple(tensor.shape)}, the network needs {shape}"
                )
        state = {name: self.tensors[stored[name]].detach().float().contiguous() for name in shapes}
        with errors_name_file(self.path):
            check_finite({stored[name]: tensor for name, tensor in state.items()})
        return state


def read_weights(folder: Path, stem: str, suffixes: Sequence[str] = (".safetensors",)) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a folder, on the CPU, and their file.

    Args:
        stem: the file's name without its suffix. Several files have an index, such as ``stem.safetensors.index.json``.
        suffixes: the formats to look for, in this order: ``.safetensors`` and ``.bin``, a pickle.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the message names it.
    """
    for suffix in suffixes:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return path, _read_tensors(path)
        index = folder / f"{path.name}.index.json"
        if index.is_file():
            return index, read_shards(index)
    names = [f"{stem}{suffix}" for suffix in suffixes]
    missing = f"no {names[0]}" if len(names) == 1 else f"neither {' nor '.join(names)}"
    raise FileNotFoundError(f"{folder} is not a checkpoint: it has {missing}")


def read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the files that ``index`` lists.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, is outside the folder, or holds other tensors than the index lists.
    """
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    shard_of = read_json(index).get("weight_map")
    with errors_name_file(index):
        if not isinstance(shard_of, dict):
            raise ValueError("weight_map must give a file for each tensor")
        for name, shard in shard_of.items():
            if not (isinstance(shard, str) and shard.endswith(suffix) and shard == Path(shard).name):
                raise ValueError(f"tensor {name!r} must be in a {suffix} file of the same folder; got {shard!r}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{index}: there is no {shard!r} beside it; copy or download it")
        found = _read_tensors(path)
        for name in sorted(found.keys() ^ {name for name, holder in shard_of.items() if holder == shard}):
            raise ValueError(f"{path}: {'unexpected' if name in found else 'missing'} tensor {name!r}")
        tensors |= found
    return tensors


def write_weights(folder: Path, stem: str, state: dict[str, Tensor], max_shard_size: int | str | None = None) -> None:
    """Write the tensors for :func:`read_weights`.

    Args:
        max_shard_size: the size limit of a file, in bytes or as "16MB"; a larger tensor gets its own file. None writes one
            file.
    """
    if max_shard_size is None:
        write_safetensors(folder / f"{stem}.safetensors", state)
        return
    pattern = f"{stem}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: state[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    require_file(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({one_line(error)}); copy or download it again") from None


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write the tensors, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    atomic_write(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))


def read_pickle(path: Path) -> Any:
    """The contents of a file of ``torch.save``, on the CPU: tensors, numbers, text, and containers of these. A pickle with code
    is refused, and none of the code is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds more than data.
    """
    require_file(path)
    with _Bounded(io.FileIO(path)) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about pickles that are refused below
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises any exception, and torch's message recommends unsafe loading
            code = re.search(r"GLOBAL (\S+)", str(error))
            refused = f"it holds {code[1]}, which is not data and was not executed" if code else ""
            why = refused or "not a whole file of tensors; copy or download it again"
            raise ValueError(f"{path}: {why}") from None


class _Bounded(io.BufferedReader):
    """A reader that never asks for more bytes than the file has: a damaged pickle would allocate gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` holds the tensors of a network, by name."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def is_dense(tensor: Tensor) -> bool:
    """Whether a stored tensor is an array of floating-point numbers in memory; a pickle may hold other kinds."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type == "cpu"


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Check that the tensors are finite.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"tensor {name!r} is not finite: it holds NaN or infinite numbers")


_READERS = {".safetensors": read_safetensors, ".bin": read_pickle}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors = _READERS[path.suffix](path)
    if not is_state_dict(tensors):
        raise ValueError(f"{path}: not a network's tensors by name")
    return tensors
