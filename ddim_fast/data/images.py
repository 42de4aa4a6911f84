"""Training images, from a folder, Parquet, IDX or a hub data set, as one uint8 tensor."""

from __future__ import annotations

import glob
import gzip
import math
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..io.decoding import decode_image, image_suffixes
from ..io.files import check_expansion, is_hidden, visible_files, warn_of_skipped, warn_once
from ..io.progress import count_of
from ..io.records import is_overview
from ..models.class_names import named_classes
from .parquet import parquet_class_names, parquet_files, read_parquet
from .resizing import Resizer, fit_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "ImageSet",
    "fit_image",
    "image_files",
    "load_images",
    "native_shape",
    "read_images",
    "stored_image",
    "to_unit_range",
]

_KINDS = (
    "unknown kind of file; give a folder, an image file (.png, .jpg or another format of Pillow), a Parquet (.parquet) or IDX "
    "file (idx3 in its name), or for evaluate a .npz file"
)

_NO_IMAGES = ": files such as .png or .jpg are needed"
_SOUNDS = ", but sounds: use --preset digits-mel in train, or a model of sounds in other commands"

# The columns of data sets in the layout of the Hugging Face Hub.
_IMAGES, _LABELS = ("image", "img"), ("label", "fine_label")

# Pillow's modes without colour.
_GREY = {"1", "L"}


@dataclass
class ImageSet:
    """Images in memory.

    Attributes:
        images: (N, C, H, W) uint8; or float32 for sounds and latents, which are trained on unscaled.
        labels: (N,) int64 class labels, or None where the data has none.
        places: the origin of each: its file, or the data set's file and a number; empty for images that were not read.
        class_names: the data set's names of its classes, in the order of their numbers, or None.
        resized: how pictures of another size were resized, in words; None where there were none.
    """

    images: Tensor
    labels: Tensor | None
    places: Sequence[str] = ()
    class_names: tuple[str, ...] | None = None
    resized: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """Moved to ``device`` if they fit into half of its free memory; otherwise left in place."""
        import torch  # not above: --help must not import torch

        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return ImageSet(self.images.to(device), labels, resized=self.resized)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1], channels_last; float32 stays as it is."""
    import torch

    unit = images.to(torch.float32, memory_format=torch.channels_last)
    return unit if images.is_floating_point() else unit.div_(127.5).sub_(1)


def load_images(
    spec: str,
    channels: int,
    size: int | tuple[int, int],
    equal: bool = False,
    num_classes: int | None = None,
    labelled: bool = True,
    class_names: Sequence[str] | None = None,
    resizer: Resizer | None = None,
) -> ImageSet:
    """Read a data set as images of (channels, size, size). Larger pictures are cropped to a square and resized; smaller ones
    are centred in a black frame (28x28 -> 32x32). Sizes may differ if none of the pictures needs the frame.

    Args:
        spec: one of

            - an image file of any format that Pillow decodes, or a folder of them. Folders with images inside it are classes,
              in the order of their names; numbers are ordered by value. Other files are skipped with a warning. An animation
              gives its first picture; transparent pixels become white;
            - a Parquet file, a pattern of them, or a folder with some (those named ``train*``, if any), or with
              ``data/train*``, in the layout of the Hugging Face Hub: a column ``image`` (or ``img``) of encoded images,
              optionally ``label`` (or ``fine_label``), whose classes are named where the file's features name them;
            - a folder with ``train-images-idx3-ubyte`` (or ``train-images.idx3-ubyte``) and its labels, each gzipped or not, or
              one such image file (IDX, as MNIST and Fashion-MNIST are distributed);
            - the name of a data set on the Hugging Face Hub (``owner/name``), which needs ``pip install ddim_fast[train]``.

        equal: refuse images of different sizes in any case.
        num_classes: the model's number of classes. Folders are then its classes if they are named by class numbers, or if there
            are as many folders as classes; otherwise their images have no label.
        labelled: whether to read the labels.
        class_names: the model's class names. If all folders have such names, they are these classes.
        resizer: resizes pictures to ``size`` and counts those of another size. With a ``how`` of the user's choice, all sizes
            may differ. None is a resizer for training data.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: the file is of another kind, holds no images, damaged ones, or images of different sizes; or the network's
            images are not square pictures.
    """
    if channels not in (1, 3) or not isinstance(size, int):
        raise ValueError(f"{spec!r} cannot be read as images of the network, which have {channels} channels and size {size}")
    source = _open(spec, num_classes, class_names, labelled, "white")
    data = _collect(_checked_rows(source, labelled), spec, channels, resizer or Resizer(size), equal)
    names = _usable(source.class_names)
    known = data.labels is not None and names is not None and int(data.labels.max()) < len(names)
    return replace(data, class_names=names) if known else data


def native_shape(spec: str) -> tuple[int, int, int]:
    """(channels, height, width) of a data set's stored images: the size of the first one, and one channel if all are grey;
    ``spec`` and errors as for :func:`load_images`."""
    size = None
    for _, image, _ in read_images(spec, labelled=False):
        size = size or (image.height, image.width)
        if image.mode not in _GREY:
            return (3, *size)
    if size is None:
        raise ValueError(f"no images in {spec!r}")
    return (1, *size)


def stored_image(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8: an image in its own size, with one channel if it has no colour."""
    return _array(image.convert("L" if image.mode in _GREY else "RGB"))


Row = tuple[str, Image.Image, int | None]


class _Source(NamedTuple):
    """An open data set.

    Attributes:
        rows: the origin of each image, the image, and its class as stored.
        class_names: by number, or None.
    """

    rows: Iterable[tuple[str, Image.Image, Any]]
    class_names: Sequence[str] | None = None


def read_images(
    spec: str,
    num_classes: int | None = None,
    labelled: bool = True,
    background: str = "white",
    class_names: Sequence[str] | None = None,
) -> Iterator[Row]:
    """The images of a data set one by one, as stored: the origin of each (its file, or the data set's file and a number), the
    image, and its class label or None. ``background`` is as of :func:`ddim_fast.io.decoding.decode_image`; other arguments and
    errors as for :func:`load_images`."""
    return _checked_rows(_open(spec, num_classes, class_names, labelled, background), labelled)


def _checked_rows(source: _Source, labelled: bool) -> Iterator[Row]:
    return ((place, image, _checked(label, place) if labelled else None) for place, image, label in source.rows)


def _open(spec: str, num_classes: int | None, class_names: Sequence[str] | None, labelled: bool, background: str) -> _Source:
    path = Path(spec)
    if path.is_dir():
        if parquet := parquet_files(path):
            return _read_parquet(parquet, labelled, background)
        idx = sorted(p for p in path.glob("*train-images*idx3*") if p.is_file() and not is_hidden(p.name))
        return _Source(_read_idx(idx[0], labelled)) if idx else _read_folder(path, num_classes, class_names, background)
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return _read_parquet([path], labelled, background)
        if "idx3" in path.name:
            return _Source(_read_idx(path, labelled))
        if path.suffix.lower() in image_suffixes():
            return _Source([(str(path), decode_image(str(path), path.read_bytes(), background), None)])
        raise ValueError(f"{path}: {_KINDS}")
    if matches := [Path(match) for match in sorted(glob.glob(spec))]:
        if not all(match.suffix.lower() == ".parquet" for match in matches):
            raise ValueError(f"{spec!r}: a pattern is for Parquet files, and it matches {matches[0]}; name a folder of images")
        return _read_parquet(matches, labelled, background)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not path.parent.is_dir():
        return _read_hub(spec, background)
    raise FileNotFoundError(f"no images at {spec!r}: not a folder, an image, Parquet or IDX file, or hub data set (owner/name)")


def _collect(rows: Iterable[Row], spec: str, channels: int, resizer: Resizer, equal: bool) -> ImageSet:
    import torch

    size, mixed = resizer.size, resizer.how is not None
    images, labels, places = [], [], []
    first: tuple[str, tuple[int, int]] | None = None
    for name, image, label in rows:
        if first is None:
            first = (name, image.size)
        if not mixed and image.size != first[1] and (equal or min(*image.size, *first[1]) < size):
            raise ValueError(
                f"the images of a data set must all have one size{'' if equal else f', or {size} pixels each way at least'}; "
                f"{first[0]} is {first[1][0]}x{first[1][1]} and {name} is {image.size[0]}x{image.size[1]}"
            )
        images.append(resizer.fit(name, image, channels))
        labels.append(label)
        places.append(name)
    if not images:
        raise ValueError(f"no images in {spec!r}{_SOUNDS if any(Path(spec).rglob('*.wav')) else _NO_IMAGES}")
    has_labels = all(label is not None for label in labels)
    known = torch.tensor(labels) if has_labels else None
    return ImageSet(torch.from_numpy(np.stack(images)), known, places, resized=resizer.line)


def _checked(label: Any, name: str) -> int | None:
    """A class label of the data set, or None."""
    if label is None or (type(label) is int and label >= 0):
        return label
    raise ValueError(f"{name}: class labels must be whole numbers from 0; got {label!r}")


def _array(image: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def image_files(folder: Path) -> set[Path]:
    """The images in a folder and its subfolders, without the overviews that commands of this package write."""
    suffixes = image_suffixes()
    files = {path for path in visible_files(folder) if not is_overview(path)}
    images = {path for path in files if path.suffix.lower() in suffixes}
    if images:  # otherwise an error follows
        warn_of_skipped(folder, files - images, "images")
    return images


def _read_folder(folder: Path, num_classes: int | None, class_names: Sequence[str] | None, background: str) -> _Source:
    files = sorted(image_files(folder))
    classes = {path: path.relative_to(folder).parts[0] for path in files if path.parent != folder}
    labels, names = _labels(sorted(set(classes.values())), num_classes, class_names)
    empty = sorted({p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name)} - set(classes.values()))
    if classes and empty:
        warn_once(f"{folder}: folders without images of their own are not classes: {', '.join(empty)}")
    rows = (
        (str(path), decode_image(str(path), path.read_bytes(), background), labels.get(classes.get(path, ""))) for path in files
    )
    return _Source(rows, names)


def _labels(
    folders: list[str], num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[dict[str, int], Sequence[str] | None]:
    """The class of each folder, as in :func:`load_images`, and the names of all classes if they have any."""
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


def _usable(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names for a model: None if they are only the numbers. Classes that share a name get their numbers added, for
    ImageNet has two cranes."""
    if names is None or list(names) == [str(i) for i in range(len(names))]:
        return None
    counts = Counter(names)
    return tuple(f"{name}/{i}" if counts[name] > 1 else name for i, name in enumerate(names))


def _read_parquet(paths: list[Path], labelled: bool, background: str) -> _Source:
    columns = (_LABELS,) if labelled else ()
    rows = (
        (name, decode_image(name, data, background), label[0] if label else None)
        for name, data, *label in read_parquet(paths, _IMAGES, *columns)
    )
    return _Source(rows, parquet_class_names(paths[0], _LABELS) if labelled else None)


def _read_idx(path: Path, labelled: bool) -> Iterator[Row]:
    images = _idx_array(path, rank=3)
    label_path = _idx_labels(path) if labelled else None
    labels = None if label_path is None else _idx_array(label_path, rank=1)
    if labels is not None and len(labels) != len(images):
        numbers = f"{count_of(len(images), 'images')} but {label_path} has {count_of(len(labels), 'labels')}"
        raise ValueError(f"{path} has {numbers}; download both again")
    for i, image in enumerate(images):
        yield f"{path}, image {i}", Image.fromarray(image), None if labels is None else int(labels[i])


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


def _read_hub(name: str, background: str) -> _Source:
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
    label = next((c for c in _LABELS if c in rows.column_names), None)
    if image is None:
        raise ValueError(f"hub data set {name!r} has no column 'image' (there are {', '.join(rows.column_names)})")

    def read() -> Iterator[tuple[str, Image.Image, Any]]:
        # Encoded as stored, to be decoded like all others.
        for i, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
            place, stored = f"{name}, row {i}", row[image]
            data = stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()
            yield place, decode_image(place, data, background), row[label] if label else None

    return _Source(read(), getattr(rows.features[label], "names", None) if label else None)
