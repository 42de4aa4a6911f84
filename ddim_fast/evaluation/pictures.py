"""The pictures that a measure compares: uint8, as stored, from a .npz file or a data set."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import load_images, native_shape, read_images, stored_image
from ..io.files import check_expansion, errors_name_file, one_line, read_json
from ..io.records import RECORD

__all__ = ["Survey", "check_pictures", "describe", "open_archive", "read_array", "read_pictures", "stored_pictures", "survey"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Survey:
    """A summary of pictures before they are compared.

    Attributes:
        count: their number.
        content: a checksum of their shapes and values.
        shapes: every (C, H, W) among them.
    """

    count: int
    content: str
    shapes: set[Shape]


def survey(pictures: Iterable[Tensor]) -> Survey:
    """Summarise (C, H, W) uint8 pictures, each read once."""
    digest, count = hashlib.sha256(), 0
    shapes: set[Shape] = set()
    for count, picture in enumerate(pictures, 1):  # noqa: B007
        shape = tuple(picture.shape)
        shapes.add(shape)
        digest.update(f"{shape} ".encode())
        digest.update(picture.contiguous().numpy().data)
    return Survey(count, digest.hexdigest(), shapes)


def stored_pictures(spec: str) -> Iterator[Tensor]:
    """The pictures of a data set one by one, (C, H, W) uint8, each in its own size, and grey if stored without colour. They
    need not fit into memory together. ``spec`` and errors are those of :func:`read_pictures`, but sizes may differ."""
    path = Path(spec)
    if path.suffix.lower() == ".npz":
        yield from _read_npz(path)
        return
    _check_finished(path)
    image = None
    for _, image, _ in read_images(spec, labelled=False):
        yield torch.from_numpy(stored_image(image).copy())
    if image is None:
        raise ValueError(f"no images in {spec!r}")


def read_pictures(spec: str) -> Tensor:
    """All pictures of a data set, (N, C, H, W) uint8, as stored.

    Args:
        spec: a ``.npz`` file with (N, H, W, C) uint8 pictures in ``arr_0``, as ``python -m ddim_fast.sample --out FILE.npz``
            and other programs write it; or any data set of :func:`ddim_fast.data.images.load_images`: a folder of image files,
            Parquet, IDX, or a data set on the Hub.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: there are no pictures, or they are damaged, unfinished or unequal; the message names the file.
    """
    path = Path(spec)
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    _check_finished(path)
    channels, height, width = native_shape(spec)
    if height != width:
        raise ValueError(f"{spec}: pictures must be square; these are {describe([(channels, height, width)])}")
    return load_images(spec, channels, height, equal=True, labelled=False).images


def check_pictures(path: Path, array: np.ndarray, image_shape: Shape | None = None) -> Tensor:
    """(N, C, H, W) from the array ``arr_0`` of the file.

    Raises:
        ValueError: the array holds no pictures, or not of ``image_shape``, (C, H, W); the message names the file.
    """
    with errors_name_file(path):
        if array.dtype != np.uint8:
            bad = np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all()
            raise ValueError(f"pictures must be uint8 in 0..255; arr_0 is {array.dtype}" + (" and has NaN or inf" * bad))
        if array.ndim != 4 or array.shape[3] not in (1, 3):
            raise ValueError(f"pictures must have the shape (N, H, W, 1 or 3); arr_0 has {array.shape}")
        if array.size == 0:
            raise ValueError("arr_0 holds no pictures")
        pictures = array.transpose(0, 3, 1, 2)
        if image_shape is not None and pictures.shape[1:] != image_shape:
            raise ValueError(f"its pictures are {describe([pictures.shape[1:]])}, not {describe([image_shape])}")
    return torch.from_numpy(np.ascontiguousarray(pictures))


def describe(shapes: Iterable[Shape]) -> str:
    """Sizes and colours of (C, H, W) pictures in words: ``32x32 RGB``, ``20x30 to 64x48 grey and RGB``."""
    sizes = sorted({shape[1:] for shape in shapes}, key=lambda size: (size[0] * size[1], size))
    colours = ["RGB" if channels == 3 else "grey" for channels in sorted({shape[0] for shape in shapes})]
    return " to ".join(f"{h}x{w}" for h, w in dict.fromkeys((sizes[0], sizes[-1]))) + f" {' and '.join(colours)}"


def open_archive(path: Path) -> np.lib.npyio.NpzFile:
    """An open ``.npz`` file; code in it is never run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        archive = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array, a .npy file")
        return archive
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except Exception as error:  # numpy and zipfile raise any exception for a damaged file
        raise ValueError(
            f"{path}: not a whole .npz file ({one_line(error)}); copy it again, or write it again by numpy.savez"
        ) from None


def read_array(archive: np.lib.npyio.NpzFile, path: Path, name: str) -> np.ndarray:
    """The array ``name`` of an open archive.

    Raises:
        ValueError: there is none, or it is damaged; the message names the file.
    """
    if name not in archive:
        raise ValueError(f"{path}: no array {name!r} (there are {', '.join(map(repr, archive.files)) or 'none'})")
    assert archive.zip is not None  # it is open
    try:
        member = archive.zip.getinfo(f"{name}.npy")
        check_expansion(member.compress_size, member.file_size)
        with archive.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:  # before numpy allocates the memory
                raise ValueError(f"its header says {shape}, but it has {member.file_size} bytes")
        return archive[name]
    except Exception as error:  # as above
        raise ValueError(
            f"{path}: array {name!r} is damaged ({one_line(error)}); copy the file again, or write it again by numpy.savez"
        ) from None


def _read_npz(path: Path) -> Tensor:
    with open_archive(path) as archive:
        return check_pictures(path, read_array(archive, path, "arr_0"))


def _check_finished(folder: Path) -> None:
    record = folder / RECORD
    if record.is_file() and read_json(record).get("finished") is not True:
        raise ValueError(f"{record}: the job that fills this folder has not finished; run its command again first")
