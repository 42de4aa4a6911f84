"""The output of a job: a folder of PNG files, or one .npz file.

Batches are written in any order, by any number of processes. A file is written whole or not at all, so the files are the state
of the job, and a killed job continues from them. ``record.json`` beside the images holds the command and its settings: images
of other settings are never added, and a job never writes among other files.
"""

from __future__ import annotations

import abc
import contextlib
import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.decoding import decode_image
from ..io.files import atomic_write, check_expansion, errors_name_file, is_hidden, read_json, remove_remains, write_json
from ..io.pictures import save_image, to_uint8
from ..io.records import GRID, OVERVIEWS, RECORD

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Batches", "FileFolder", "NpzFile", "Output", "PngFolder", "require_empty", "require_parents"]

# An --out with one of these suffixes does not mean a folder.
_FILES = {
    *(".zip", ".npy", ".npz", ".pt", ".safetensors", ".onnx", ".parquet", ".json"),
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".mp4", ".avi", ".mov", ".wav", ".flac", ".mp3"),
}

_END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Batches:
    """The images of a job. Batch k is always images kB to (k+1)B - 1. Where an image's last bits depend on its batch, as on a
    GPU, a continued job therefore makes the same bits.

    Attributes:
        seeds: N integers, one per image.
        labels: N class labels, or None.
        size: B.
        image_shape: (H, W, C) of a picture.
    """

    seeds: Sequence[int]
    labels: Sequence[int] | None
    size: int
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.size)

    def part(self, k: int) -> slice:
        """The range of images in batch k."""
        return slice(k * self.size, (k + 1) * self.size)

    def __getitem__(self, k: int) -> tuple[Sequence[int], Sequence[int] | None]:
        """Seeds and labels of batch k."""
        part = self.part(k)
        return self.seeds[part], None if self.labels is None else self.labels[part]

    def count(self, ks: Iterable[int]) -> int:
        """The number of images in these batches."""
        return sum(len(self[k][0]) for k in ks)


class Output(abc.ABC):
    """The base of both forms of output.

    Attributes:
        path: the path that the user named.
        folder: the folder for the batches and their record.
        batches: its images.
        noun: the name of its items, in the plural.
    """

    noun = "images"

    def __init__(self, path: Path, folder: Path, batches: Batches) -> None:
        self.path, self.folder, self.batches = path, folder, batches

    @abc.abstractmethod
    def files(self, k: int) -> list[Path]:
        """The files of batch k."""

    @abc.abstractmethod
    def is_whole(self, k: int, file: Path) -> bool:
        """Whether a file of batch k exists and passes a quick check for damage."""

    def convert(self, images: Any) -> np.ndarray:
        """A sampler's images, (n, C, H, W) in [-1, 1], a tensor or an array, converted for :meth:`write`: here (n, H, W, C)
        uint8 pictures."""
        return to_uint8(images)

    @abc.abstractmethod
    def write(self, k: int, items: np.ndarray) -> None:
        """Write batch k, converted by :meth:`convert`."""

    @abc.abstractmethod
    def read(self, k: int) -> np.ndarray:
        """The items of batch k, read back from the files of :meth:`write`."""

    def shown(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [-1, 1]: pictures of a sampler's images for people."""
        return images

    def preview(self, count: int) -> np.ndarray:
        """Pictures of the first ``count`` images for people: (n, C, H, W) in [-1, 1]."""
        return np.moveaxis(self._first(count), -1, 1) / np.float32(127.5) - 1

    def _first(self, count: int) -> np.ndarray:
        ks = range(min(len(self.batches), -(-count // self.batches.size)))
        return np.concatenate([self.read(k) for k in ks])[:count]

    @abc.abstractmethod
    def finish(self) -> None:
        """Turn the complete batches into the finished output."""

    @abc.abstractmethod
    def remove_remains(self) -> None:
        """Remove half-written files of a process that was killed."""

    def record(self) -> dict[str, Any] | None:
        """The contents of the record, or None without one.

        Raises:
            ValueError: it is damaged; the message names the file.
        """
        path = self.folder / RECORD
        if not path.exists():
            return None
        try:
            values = read_json(path)
            with errors_name_file(path):
                return _checked_record(values)
        except ValueError as error:
            raise ValueError(f"{error}; name another --out") from None

    def begun(self) -> dict[str, Any]:
        """The record of a job that has begun."""
        record = self.record()
        assert record is not None
        return record

    def begin(self, record: dict[str, Any]) -> None:
        """Create the folder, with the record of an unfinished job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            write_json(self.folder / RECORD, {**record, "finished": False})
        except OSError:
            with contextlib.suppress(OSError):  # a folder with a lock is removed with that
                self.folder.rmdir()
            raise

    def prepare(self, there: dict[str, Any] | None, record: dict[str, Any]) -> list[int] | None:
        """Begin a job, or prepare to continue one.

        Args:
            there: the result of :meth:`record`, passed by :meth:`check`.
            record: the record of a new job, with its "command" and "settings".

        Returns:
            The batches to make; None if the job is finished.
        """
        if there is None:
            self.begin(record)
        self.remove_remains()
        missing = self.missing()
        return None if there is not None and there["finished"] and not missing else missing

    def note(self, **fields: Any) -> None:
        """Write these fields into the record."""
        write_json(self.folder / RECORD, {**self.begun(), **fields})

    def check(self, there: dict[str, Any] | None, record: dict[str, Any]) -> None:
        """Check that a job may begin here, or continue the present one.

        Args:
            there: the result of :meth:`record`.
            record: the record of the job. Its "settings" are by option, such as ``{"steps": 20}``, or by positional argument,
                such as ``{"IMAGES": ...}``.

        Raises:
            ValueError: the place holds other files, or a job with other settings; the message names the option and both values.
        """
        if there is None:
            require_empty(self.folder)
            return
        if there.get("command") != record["command"]:
            made = there.get("command") or "another version"
            raise ValueError(f"--out {self.path} holds the output of {made}, not of {record['command']}; name another --out")
        begun, settings = there["settings"], record["settings"]
        for option in [*settings, *(begun.keys() - settings.keys())]:
            old, new = begun.get(option), settings.get(option)
            if old != new:
                raise ValueError(
                    f"--out {self.path} was begun with {_named(option)} {_shown(old)}, not {_shown(new)}; "
                    "give the same settings to continue it, or name another --out"
                )

    def missing(self) -> list[int]:
        """The batches with a missing or damaged file."""
        return [k for k in range(len(self.batches)) if not all(self.is_whole(k, file) for file in self.files(k))]


class FileFolder(Output):
    """A folder with one file per seed, ``000012.png`` for seed 12, or per name.

    Args:
        names: names of the files, without their suffix; None uses the seeds.

    Attributes:
        suffix: the suffix of the files.
        overview: the name of the picture of the first images of a sampling job.

    Raises:
        ValueError: a seed or a name is given twice.
    """

    suffix: str
    overview: str

    def __init__(self, path: Path, batches: Batches, names: Sequence[str] | None = None) -> None:
        super().__init__(path, path, batches)
        self.names = [f"{seed:06d}" for seed in batches.seeds] if names is None else names
        twice, times = Counter(batches.seeds if names is None else names).most_common(1)[0]
        if times > 1:
            if names is None:
                raise ValueError(
                    f"--seeds names {twice} more than once: a folder holds one image per seed; name a .npz file, which holds "
                    "them all"
                )
            raise ValueError(f"{times} images would be {twice}{self.suffix} in {path}; write them into different folders")

    def files(self, k: int) -> list[Path]:
        return [self.folder / f"{name}{self.suffix}" for name in self.names[self.batches.part(k)]]

    def finish(self) -> None:
        self.note(finished=True)

    def remove_remains(self) -> None:
        ours = {*(f"{name}{self.suffix}" for name in self.names), RECORD, *OVERVIEWS}
        remove_remains(self.folder, ours.__contains__)


class PngFolder(FileFolder):
    """A folder of PNGs."""

    suffix, overview = ".png", GRID

    def is_whole(self, k: int, file: Path) -> bool:
        try:
            with open(file, "rb") as stream:
                stream.seek(-len(_END_OF_PNG), os.SEEK_END)
                return stream.read() == _END_OF_PNG
        except OSError:  # missing or truncated
            return False

    def write(self, k: int, items: np.ndarray) -> None:
        for file, picture in zip(self.files(k), items, strict=True):
            save_image(file, picture)

    def read(self, k: int) -> np.ndarray:
        pictures = []
        for file in self.files(k):
            with errors_name_file(file):
                image = decode_image(file.name, file.read_bytes())
                pictures.append(np.asarray(image).reshape(self.batches.image_shape))
        return np.stack(pictures)


class NpzFile(Output):
    """One file in the form that evaluations of image models read (Dhariwal and Nichol 2021's code): ``arr_0`` is the (N, H, W,
    C) uint8 images, ``arr_1`` their (N,) int64 class labels, if any. ``record.json`` is in the archive.

    Batches are kept in a folder beside it, ``FILE.npz.partial``, and joined once all are complete.
    """

    def __init__(self, path: Path, batches: Batches) -> None:
        super().__init__(path, path.with_name(f"{path.name}.partial"), batches)

    def files(self, k: int) -> list[Path]:
        return [self.folder / f"batch-{k:06d}.npy"]

    def is_whole(self, k: int, file: Path) -> bool:
        try:
            stored = np.load(file, mmap_mode="r")
        except Exception:  # numpy raises any exception for a damaged file
            return False
        return stored.dtype == np.uint8 and stored.shape == (len(self.batches[k][0]), *self.batches.image_shape)

    def write(self, k: int, items: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, items)
        atomic_write(self.files(k)[0], buffer.getvalue())

    def read(self, k: int) -> np.ndarray:
        return np.load(self.files(k)[0])

    def record(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return super().record()
        try:
            with zipfile.ZipFile(self.path) as archive:
                member = archive.getinfo(RECORD)
                check_expansion(member.compress_size, member.file_size)
                return _checked_record(json.loads(archive.read(member)))
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:  # zipfile raises any exception for a damaged file, or another program's
            raise ValueError(f"--out {self.path} exists and has no {RECORD} of its settings; name another file") from None

    def finish(self) -> None:
        batches, shape = self.batches, (len(self.batches.seeds), *self.batches.image_shape)
        joined = self.folder / "joined.npz"
        with open(joined, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                # A ZipInfo made by hand has no time of day: the same images give the same file.
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    for k in range(len(batches)):
                        member.write(self.read(k).data)
                if batches.labels is not None:
                    with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.array(batches.labels, dtype=np.int64))
                archive.writestr(zipfile.ZipInfo(RECORD), json.dumps({**self.begun(), "finished": True}, indent=2))
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(joined) as archive:
            if archive.testzip() is not None:
                raise OSError(f"{joined} is not as it was written: the disk may be failing; the same command joins it again")
        os.replace(joined, self.path)
        self.remove_remains()

    def missing(self) -> list[int]:
        return [] if self.path.exists() else super().missing()

    def remove_remains(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.folder, ignore_errors=True)


def require_empty(folder: Path) -> None:
    """Check that the place of a command's output is free.

    Raises:
        ValueError: it is a file, or a folder that is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file; name a folder that is new or empty")
    require_parents("--out", folder)
    things = sorted(entry.name for entry in folder.iterdir() if not is_hidden(entry.name)) if folder.exists() else []
    if things:
        more = f" and {len(things) - 1} more" if len(things) > 1 else ""
        raise ValueError(f"--out {folder} is not empty ({things[0]}{more}); name a folder that is new or empty")
    if not folder.exists() and folder.suffix.lower() in _FILES:
        raise ValueError(f"--out {folder} would be a folder of that name; name one without {folder.suffix}")


def require_parents(option: str, path: Path) -> None:
    """Check that the parent folders of ``path`` exist or can be created.

    Args:
        option: the option that names it.

    Raises:
        ValueError: one of them is a file.
    """
    for parent in path.parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise ValueError(f"{option} {path}: {parent} is a file, not a folder; name another place")


def _checked_record(record: Any) -> dict[str, Any]:
    fields = record if isinstance(record, dict) else {}
    if not isinstance(fields.get("settings"), dict) or not isinstance(fields.get("finished"), bool):
        raise ValueError("not the record of a job")
    return fields


def _named(option: str) -> str:
    return option if option.isupper() else f"--{option}"


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
