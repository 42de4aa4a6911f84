"""The sources of images: folders, Parquet, tar and IDX files, and hub data sets, record by record."""

from __future__ import annotations

import functools
import glob
import gzip
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..io.decoding import decode_image, image_suffixes
from ..io.files import check_expansion, is_hidden, visible_files, warn_of_skipped, warn_once
from ..io.progress import count_of
from ..io.records import is_overview
from ..models.class_names import named_classes
from .parquet import encoded, parquet_class_names, parquet_files, read_parquet
from .tar import Sample, expand_braces, read_tar

__all__ = ["Record", "Source", "image_files", "number_classes", "open_source"]

_KINDS = (
    "unknown kind of file; give a folder, an image file (.png, .jpg or another format of Pillow), a Parquet (.parquet), tar "
    "(.tar) or IDX file (idx3 in its name), or for evaluate a .npz file"
)

# The columns of data sets in the layout of the Hugging Face Hub.
_IMAGES, _LABELS = ("image", "img"), ("label", "fine_label")


class Record(NamedTuple):
    """An image that is not decoded yet.

    Attributes:
        place: its origin: its file, or the data set's file and a number.
        read: returns the image and its class as stored; a ValueError or an OSError is about this record alone.
    """

    place: str
    read: Callable[[], tuple[Image.Image, Any]]


class Source(NamedTuple):
    """An open data set.

    Attributes:
        records: its records, in order; an error while they are drawn is about the whole data set.
        files: those that it is read from.
        class_names: by number, or None.
        named: whether its records have names as classes, too, in place of numbers.
    """

    records: Iterable[Record]
    files: Sequence[Path]
    class_names: Sequence[str] | None = None
    named: bool = False


def open_source(
    spec: str, num_classes: int | None, class_names: Sequence[str] | None, labelled: bool, background: str
) -> Source:
    """Open a data set. Arguments and errors are those of :func:`ddim_fast.data.images.load_images`; ``background`` is that of
    :func:`ddim_fast.io.decoding.decode_image`."""
    path = Path(spec)
    if path.is_dir():
        if parquet := parquet_files(path):
            return _open_parquet(parquet, labelled, background)
        idx = sorted(p for p in path.glob("*train-images*idx3*") if p.is_file() and not is_hidden(p.name))
        return _open_idx(idx[0], labelled) if idx else _open_folder(path, num_classes, class_names, background)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".tar"):
            return _open_files([path], labelled, background)
        if "idx3" in path.name:
            return _open_idx(path, labelled)
        if suffix in image_suffixes():
            return Source([Record(str(path), functools.partial(_read_file, path, None, background))], [path])
        raise ValueError(f"{path}: {_KINDS}")
    if matches := _matches(spec):
        other = next((match for match in matches if match.suffix.lower() not in (".parquet", ".tar")), None)
        if other is not None:
            raise ValueError(
                f"{spec!r}: a pattern is for Parquet or tar files, and it matches {other}; name a folder of images"
            )
        return _open_files(matches, labelled, background)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not path.parent.is_dir():
        return _open_hub(spec, labelled, background)
    raise FileNotFoundError(
        f"no images at {spec!r}: not a folder, an image, Parquet, tar or IDX file, or hub data set (owner/name)"
    )


def _matches(pattern: str) -> list[Path]:
    """The files of a pattern with ``*`` or with ranges such as ``{000..009}``, each of which must be there."""
    found = []
    for part in expand_braces(pattern):
        files = sorted(glob.glob(part))
        if not files and part != pattern:
            raise FileNotFoundError(f"no images at {pattern!r}: there is no {part}; download it or name another range")
        found += [Path(file) for file in files]
    return found


def _open_files(paths: list[Path], labelled: bool, background: str) -> Source:
    """Parquet or tar files, which make one data set."""
    suffixes = {path.suffix.lower() for path in paths}
    if suffixes == {".parquet"}:
        return _open_parquet(paths, labelled, background)
    if suffixes != {".tar"}:
        raise ValueError(f"a pattern that matches Parquet and tar files ({paths[0]}, {paths[-1]}); name either")
    records = (
        Record(sample.place, functools.partial(_read_sample, sample, labelled, background)) for sample in read_tar(paths)
    )
    return Source(records, paths, named=labelled)


def _read_sample(sample: Sample, labelled: bool, background: str) -> tuple[Image.Image, Any]:
    return decode_image(sample.place, sample.image(), background), sample.label() if labelled else None


def image_files(folder: Path) -> set[Path]:
    """The images in a folder and its subfolders, without the overviews that commands of this package write."""
    suffixes = image_suffixes()
    files = {path for path in visible_files(folder) if not is_overview(path)}
    images = {path for path in files if path.suffix.lower() in suffixes}
    if images:  # otherwise an error follows
        warn_of_skipped(folder, files - images, "images")
    return images


def _open_folder(folder: Path, num_classes: int | None, class_names: Sequence[str] | None, background: str) -> Source:
    files = sorted(image_files(folder))
    classes = {path: path.relative_to(folder).parts[0] for path in files if path.parent != folder}
    labels, names = number_classes(sorted(set(classes.values())), num_classes, class_names)
    empty = sorted({p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name)} - set(classes.values()))
    if classes and empty:
        warn_once(f"{folder}: folders without images of their own are not classes: {', '.join(empty)}")
    records = (
        Record(str(path), functools.partial(_read_file, path, labels.get(classes.get(path, "")), background)) for path in files
    )
    return Source(records, files, names)


def _read_file(path: Path, label: int | None, background: str) -> tuple[Image.Image, int | None]:
    return decode_image(str(path), path.read_bytes(), background), label


def number_classes(
    folders: list[str], num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[dict[str, int], Sequence[str] | None]:
    """The class of each folder, or of each name that records have as their class, as in
    :func:`ddim_fast.data.images.load_images`; and the names of all classes if they have any."""
    named = [named_classes(folder, class_names or ()) for folder in folders]
    if folders and all(len(numbers) == 1 for numbers in named):
        return {folder: numbers[0] for folder, numbers in zip(folders, named, strict=True)}, class_names
    are_numbers = all(map(str.isdecimal, folders))
    if are_numbers and num_classes is not None and all(int(name) < num_classes for name in folders):
        return {name: int(name) for name in folders}, None
    if num_classes not in (None, len(folders)):
        return {}, None
    names = sorted(folders, key=int if are_numbers else str)
    return {name: i for i, name in enumerate(names)}, names


def _open_parquet(paths: list[Path], labelled: bool, background: str) -> Source:
    columns = (_LABELS,) if labelled else ()
    records = (
        Record(place, functools.partial(_read_stored, place, data, label[0] if label else None, background))
        for place, data, *label in read_parquet(paths, _IMAGES, *columns)
    )
    return Source(records, paths, parquet_class_names(paths[0], _LABELS) if labelled else None)


def _read_stored(place: str, data: Any, label: Any, background: str) -> tuple[Image.Image, Any]:
    return decode_image(place, encoded(place, data, "image"), background), label


def _open_idx(path: Path, labelled: bool) -> Source:
    label_path = _idx_labels(path) if labelled else None
    return Source(_read_idx(path, label_path), [path] if label_path is None else [path, label_path])


def _read_idx(path: Path, label_path: Path | None) -> Iterator[Record]:
    images = _idx_array(path, rank=3)
    labels = None if label_path is None else _idx_array(label_path, rank=1)
    if labels is not None and len(labels) != len(images):
        numbers = f"{count_of(len(images), 'images')} but {label_path} has {count_of(len(labels), 'labels')}"
        raise ValueError(f"{path} has {numbers}; download both again")
    for i, image in enumerate(images):
        yield Record(f"{path}, image {i}", functools.partial(_read_array, image, None if labels is None else int(labels[i])))


def _read_array(image: np.ndarray, label: int | None) -> tuple[Image.Image, int | None]:
    return Image.fromarray(image), label


def _idx_labels(path: Path) -> Path | None:
    """The label file beside an image file: the same name, but for the differences between downloads."""

    def key(name: str) -> str:
        return name.removesuffix(".gz").replace(".", "-")

    wanted = key(path.name).replace("images", "labels").replace("idx3", "idx1")
    found = sorted(p for p in path.parent.iterdir() if key(p.name) == wanted and p.is_file())
    alike = [p for p in found if p.suffix == path.suffix]
    return next(iter(alike or found), None)


def _idx_array(path: Path, rank: int) -> np.ndarray:
    """An IDX file of unsigned bytes: 0, 0, 8, rank, the big-endian sizes, the data."""
    stored = path.stat().st_size
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            kind, shape = struct.unpack(">HBB", file.read(4)), struct.unpack(f">{rank}I", file.read(4 * rank))
            if kind != (0, 8, rank):
                raise ValueError(f"no IDX header for {rank}-dimensional unsigned bytes")
            size = math.prod(shape)
            check_expansion(stored, size)
            data = file.read(size + 1)
        if len(data) != size or 0 in shape[1:]:
            raise ValueError(f"its header says {'x'.join(map(str, shape))}, but its data have another size")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (ValueError, struct.error, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole IDX file ({error}); copy or download it again") from None


def _open_hub(name: str, labelled: bool, background: str) -> Source:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"no folder {name!r} here, and loading it from the hub needs: pip install 'ddim_fast[train]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library also raises exceptions of its dependencies; all mean the same to the user
        raise ValueError(f"cannot load {name!r} from the hub: {error}") from None
    image = next((c for c in _IMAGES if c in rows.column_names), None)
    label = next((c for c in _LABELS if c in rows.column_names), None) if labelled else None
    if image is None:
        raise ValueError(f"hub data set {name!r} has no column 'image' (there are {', '.join(rows.column_names)})")

    records = (
        Record(f"{name}, row {i}", functools.partial(_read_hub_row, f"{name}, row {i}", row[image], row.get(label), background))
        for i, row in enumerate(rows.cast_column(image, datasets.Image(decode=False)))  # encoded, to be decoded like all others
    )
    files = [Path(file["filename"]) for file in rows.cache_files]
    return Source(records, files, getattr(rows.features[label], "names", None) if label else None)


def _read_hub_row(place: str, stored: dict[str, Any] | None, label: Any, background: str) -> tuple[Image.Image, Any]:
    data = None if stored is None else stored["bytes"]
    if stored is not None and data is None and stored["path"] is not None:
        data = Path(stored["path"]).read_bytes()
    return _read_stored(place, data, label, background)
