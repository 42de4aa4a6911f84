"""The folder of an export, and reading it without torch or the package onnx.

unet.onnx       the network                     sampler.onnx   the whole sampler
config.json     the network's configuration, as in a checkpoint
timesteps.json  the timesteps fitted to it, if any, as in a checkpoint
schedule.json   the sampler's settings, timesteps and coefficients, and how the files were made
README.md       for people                      SHA256SUMS     of all the others, as sha256sum writes them
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.files import atomic_write, errors_name_file, read_json
from ..models.checkpoint import load_coefficients, load_config, load_timesteps, timesteps_file
from ..models.config import UNetConfig

__all__ = [
    "CHECKSUMS",
    "PLAN",
    "SAMPLER",
    "SCHEDULE",
    "UNET",
    "ExportFolder",
    "check_fields",
    "is_export",
    "is_plan",
    "verify",
    "write_checksums",
]

UNET, SAMPLER, SCHEDULE, CHECKSUMS = "unet.onnx", "sampler.onnx", "schedule.json", "SHA256SUMS"

# Of an export to a plan, see plan_folder.py.
PLAN = "plan.json"

# Keys of schedule.json.
_FIELDS = {"settings": dict, "dtype": str, "timesteps": list, "versions": dict}
_SETTINGS = {"steps", "eta", "spacing", "solver", "clip"}


def is_export(path: Path) -> bool:
    """Whether ``path`` is a folder of this kind."""
    return (path / SCHEDULE).is_file() or (path / UNET).is_file()


def is_plan(path: Path) -> bool:
    """Whether ``path`` is an export to a plan of native operators."""
    return (path / PLAN).is_file()


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` of everything else in ``folder``."""
    files = sorted(p.name for p in folder.iterdir() if p.name != CHECKSUMS)
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in files]
    atomic_write(folder / CHECKSUMS, "".join(lines).encode())


@dataclass(frozen=True)
class ExportFolder:
    """An export with its description checked; :meth:`model` checks the models themselves.

    Attributes:
        path: the folder.
        config: the network.
        schedule: the contents of schedule.json.
        identity: a checksum of the whole folder.
    """

    path: Path
    config: UNetConfig
    schedule: dict[str, Any]
    identity: str

    @classmethod
    def open(cls, path: Path) -> ExportFolder:
        """Read a folder's description.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or was changed, or a name leads out of the folder.
        """
        identity = verify(path, "config.json", SCHEDULE)
        schedule = read_json(path / SCHEDULE)
        with errors_name_file(path / SCHEDULE):
            check_fields(schedule, _FIELDS)
            if set(schedule["settings"]) != _SETTINGS:
                raise ValueError(f"'settings' must be {', '.join(sorted(_SETTINGS))}; got {', '.join(schedule['settings'])}")
            if not isinstance(schedule["settings"]["solver"], str):
                raise ValueError(f"'solver' must be a name; got {schedule['settings']['solver']!r}")
        return cls(path, load_config(path), schedule, identity)

    @property
    def settings(self) -> dict[str, Any]:
        """The sampler's settings: steps, eta, spacing, solver and clip."""
        return self.schedule["settings"]

    @property
    def fitted_timesteps(self) -> dict[str, dict[int, list[int]]] | None:
        """The network's fitted timesteps, by solver and number of steps; None if there are none.

        Raises:
            ValueError: their file is damaged or was changed.
        """
        file = timesteps_file(self.path)
        if file.is_file():
            verify(self.path, file.name)
        return load_timesteps(self.path, self.config.num_train_timesteps)

    @property
    def fitted_coefficients(self) -> dict[int, list[list[float]]]:
        """The coefficients of the network's fitted solvers, by number of steps."""
        return load_coefficients(self.path)

    def model(self, name: str) -> Path:
        """The path of one of the models, after comparing it and its external data with their checksums.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it was changed.
        """
        verify(self.path, name, *(other for other in _checksums(self.path) if other.startswith(f"{name}.")))
        return self.path / name


def check_fields(values: dict[str, Any], fields: Mapping[str, type]) -> None:
    """Compare the contents of a description with the types of its fields.

    Raises:
        ValueError: a field is missing or of another type; the message names it.
    """
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise ValueError(f"{name!r} is missing or damaged; export the model again")


def verify(folder: Path, *names: str) -> str:
    """Compare files of an export with their checksums.

    Returns:
        A checksum of the whole folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or was changed.
    """
    sums = _checksums(folder)
    for name in names:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a whole export: it has no {name}; export or copy it again")
        if name not in sums:
            raise ValueError(f"{folder / CHECKSUMS}: there is no checksum of {name}")
        if _sha256(file) != sums[name]:
            raise ValueError(f"{file}: damaged or changed: its checksum is not that of {CHECKSUMS}; export or copy it again")
    return hashlib.sha256((folder / CHECKSUMS).read_bytes()).hexdigest()


def _checksums(folder: Path) -> dict[str, str]:
    """The checksums in ``SHA256SUMS``, by file name."""
    path = folder / CHECKSUMS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an export: it has no {CHECKSUMS}")
    sums = {}
    with errors_name_file(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
            if match is None:
                raise ValueError(f"{line[:80]!r} is not a checksum and a name")
            if Path(match[2]).name != match[2] or match[2] == "..":
                raise ValueError(f"{match[2]!r} leads out of the folder")
            sums[match[2]] = match[1]
    return sums


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
