"""The pictures that a measure compares: (N, C, H, W) uint8, from whatever holds them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import check_expansion, naming
from ..records import PICTURES
from ..training.data import load_images, native_shape

__all__ = ["open_archive", "read_array", "read_pictures"]


def read_pictures(spec: str, image_shape: tuple[int, int, int] | None = None) -> Tensor:
    """All pictures of a data set.

    Args:
        spec: a ``.npz`` file with (N, H, W, C) uint8 pictures in ``arr_0``, as ``python -m ddim_fast.sample --out FILE.npz``
            and other programs write it; or whatever :func:`ddim_fast.training.data.load_images` reads: a folder of image files,
            Parquet, IDX, or a data set on the Hub.
        image_shape: (C, H, W) that a data set is brought to as training does it; None leaves them as they are stored. Pictures
            in a ``.npz`` file are never changed.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: no pictures, damaged, unfinished or unequal ones, or in a ``.npz`` file of another shape; the message names
            the file.
    """
    path = Path(spec)
    if path.suffix.lower() == ".npz":
        pictures = _read_npz(path)
        if image_shape is not None and pictures.shape[1:] != image_shape:
            raise ValueError(f"{path}: its pictures are {_size(tuple(pictures.shape[1:]))}, not {_size(image_shape)}")
        return pictures
    for record in (path / name for name in PICTURES):
        if record.is_file():
            with naming(record):
                if json.loads(record.read_bytes()).get("finished") is not True:
                    raise ValueError("the job that fills this folder has not finished; the same command goes on with it")
    as_stored = image_shape is None
    if as_stored:
        image_shape = native_shape(spec)
        if image_shape[1] != image_shape[2]:
            raise ValueError(f"{spec}: pictures must be square; these are {_size(image_shape)}")
    return load_images(spec, image_shape[0], image_shape[1], equal=as_stored).images


def open_archive(path: Path) -> np.lib.npyio.NpzFile:
    """A ``.npz`` file, in which no code is looked for.

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
    except Exception as error:  # numpy and zipfile raise whatever they run into in a damaged file
        raise ValueError(f"{path}: not a whole .npz file ({' '.join(str(error).split())})") from None


def read_array(archive: np.lib.npyio.NpzFile, path: Path, name: str) -> np.ndarray:
    """The array ``name`` of an open archive.

    Raises:
        ValueError: there is none, or it is damaged; the message names the file.
    """
    if name not in archive:
        raise ValueError(f"{path}: no array {name!r} (there are {', '.join(map(repr, archive.files)) or 'none'})")
    try:
        member = archive.zip.getinfo(f"{name}.npy")
        check_expansion(member.compress_size, member.file_size)
        with archive.zip.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            if math.prod(shape) * dtype.itemsize > member.file_size:  # before numpy takes the memory
                raise ValueError(f"its header says {shape}, and there are {member.file_size} bytes")
        return archive[name]
    except Exception as error:  # as above
        raise ValueError(f"{path}: array {name!r} is damaged ({' '.join(str(error).split())})") from None


def _read_npz(path: Path) -> Tensor:
    with open_archive(path) as archive:
        pictures = read_array(archive, path, "arr_0")
    with naming(path):
        if pictures.dtype != np.uint8:
            bad = np.issubdtype(pictures.dtype, np.floating) and not np.isfinite(pictures).all()
            raise ValueError(f"pictures must be uint8 in 0..255; arr_0 is {pictures.dtype}" + (" and has NaN or inf" * bad))
        if pictures.ndim != 4 or pictures.shape[3] not in (1, 3):
            raise ValueError(f"pictures must have the shape (N, H, W, 1 or 3); arr_0 has {pictures.shape}")
        if len(pictures) == 0:
            raise ValueError("arr_0 holds no pictures")
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))


def _size(image_shape: tuple[int, ...]) -> str:
    channels, height, width = image_shape
    return f"{height}x{width} {'grey' if channels == 1 else 'RGB'}"
