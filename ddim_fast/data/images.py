"""Training images, from a folder, Parquet, tar, IDX or a hub data set, as one uint8 tensor."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..io.memory import available_memory
from .collected import Collected, Entry, Outcome, Unreadable
from .decoded import DecodedFile
from .resizing import Resizer, fit_image
from .sources import Record, Source, image_files, number_classes, open_source

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

_NO_IMAGES = ": files such as .png or .jpg are needed"
_SOUNDS = ", but sounds: use --preset digits-mel in train, or a model of sounds in other commands"

# Pillow's modes without colour.
_GREY = {"1", "L"}


@dataclass
class ImageSet:
    """Images in memory, or in a file that is mapped into it.

    Attributes:
        images: (N, C, H, W) uint8; or float32 for sounds and latents, which are trained on unscaled. Not to be written to:
            they may be a file that is mapped read-only.
        labels: (N,) int64 class labels, or None where the data has none.
        places: the origin of each: its file, or the data set's file and a number; empty for images that were not read.
        class_names: the data set's names of its classes, in the order of their numbers, or None.
        resized: how pictures of another size were resized, in words; None where there were none.
        left_out: the records that could not be read: the place of each, and why.
    """

    images: Tensor
    labels: Tensor | None
    places: Sequence[str] = ()
    class_names: tuple[str, ...] | None = None
    resized: str | None = None
    left_out: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """Moved to ``device`` if they fit into half of its free memory; otherwise left in place."""
        import torch  # not above: --help must not import torch

        if device.type == "cuda" and self.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)


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
    max_bad: int = 0,
    mapped: bool = False,
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
            - a tar file, or a pattern of them such as ``shards-{000..009}.tar``, as WebDataset makes them: an image and
              optionally its class, as a number or a name, in a ``.cls`` file or as "label" of a ``.json`` file
              (:mod:`ddim_fast.data.tar`);
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
        max_bad: the number of records that are left out because they cannot be read; one more is an error.
        mapped: decode images that would take more than a quarter of the memory that is free once into a file in the cache
            folder (:class:`ddim_fast.data.decoded.DecodedFile`), which is mapped into memory; the same data is read from there
            afterwards.

    Raises:
        FileNotFoundError: there is nothing at ``spec``.
        ValueError: the file is of another kind, holds no images, damaged ones, or images of different sizes; the network's
            images are not square pictures; or the data has changed since it was decoded into a file.
    """
    if channels not in (1, 3) or not isinstance(size, int):
        raise ValueError(f"{spec!r} cannot be read as images of the network, which have {channels} channels and size {size}")
    source = open_source(spec, num_classes, class_names, labelled, "white")
    resizer = resizer or Resizer(size)
    fit = functools.partial(_fitted, source, labelled, channels, resizer)
    work = (functools.partial(fit, record) for record in source.records)
    check = functools.partial(_check_size, equal, resizer)
    file = None
    if mapped:
        reading = {"equal": equal, "classes": num_classes, "labelled": labelled, "names": class_names, "resize": resizer.how}
        file = DecodedFile(spec, (channels, size, size), source.files, reading)
    collected, pixels = _collect(work, check, max_bad, file)
    if not collected.entries:
        raise ValueError(f"no images in {spec!r}{_SOUNDS if any(Path(spec).rglob('*.wav')) else _NO_IMAGES}")
    for entry in collected.entries:
        resizer.note(entry.place, entry.size)
    labels, names = _numbered(collected, spec, source, num_classes, class_names)
    return ImageSet(
        _as_tensor(pixels), labels, [entry.place for entry in collected.entries], names, resizer.line, collected.bad.found
    )


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
    source = open_source(spec, num_classes, class_names, labelled, background)
    numbers = {name: number for number, name in enumerate(class_names or ())}

    def row(record: Record) -> Row:
        image, label = record.read()
        if source.named and isinstance(label, str):
            label = numbers.get(label)
        return record.place, image, _checked(label, record.place) if labelled else None

    return map(row, source.records)


def _fitted(source: Source, labelled: bool, channels: int, resizer: Resizer, record: Record) -> Outcome:
    """A record in the network's size and colours."""
    try:
        image, label = record.read()
        if not labelled:
            label = None
        elif not (source.named and isinstance(label, str)):
            label = _checked(label, record.place)
        pixels = fit_image(image, channels, resizer.size, resizer.how or "crop")
        return Entry(record.place, label, image.size), pixels
    except (ValueError, OSError) as error:
        return Unreadable(record.place, error)


def _check_size(equal: bool, resizer: Resizer, first: Entry, entry: Entry) -> None:
    """A ValueError where an image may not have another size than the first one."""
    if resizer.how is None and entry.size != first.size and (equal or min(*entry.size, *first.size) < resizer.size):
        larger = "" if equal else f", or {resizer.size} pixels each way at least"
        raise ValueError(
            f"the images of a data set must all have one size{larger}; {first.place} is {first.size[0]}x{first.size[1]} "
            f"and {entry.place} is {entry.size[0]}x{entry.size[1]}"
        )


def _collect(
    work: Iterator[Callable[[], Outcome]], check: Callable[[Entry, Entry], None], max_bad: int, file: DecodedFile | None
) -> tuple[Collected, np.ndarray]:
    """The records and (N, C, H, W) uint8: in memory, or in ``file`` where they are there already or take too much memory.

    Args:
        work: decodes one record after the other.
    """
    outcomes: deque[Outcome] = deque()
    if file is None or not file.is_begun:
        # A quarter, for they are held twice while they are stacked, and other things need memory as well.
        taken, limit = 0, math.inf if file is None else available_memory() // 4
        collected = Collected(check, max_bad)
        for decode in work:
            outcome = decode()
            collected.add(outcome)
            outcomes.append(outcome)
            taken += 0 if isinstance(outcome, Unreadable) else outcome[1].nbytes
            if taken > limit:
                break
        else:
            pixels = [outcome[1] for outcome in outcomes if not isinstance(outcome, Unreadable)]
            return collected, np.stack(pixels) if pixels else np.empty(0, np.uint8)
    assert file is not None
    collected = Collected(check, max_bad)
    return collected, file.load(itertools.chain(_drained(outcomes), work), collected)


def _drained(outcomes: deque[Outcome]) -> Iterator[Callable[[], Outcome]]:
    """As work, what has been decoded, which is given up on the way."""
    while outcomes:
        yield functools.partial(_given, outcomes.popleft())


def _given(outcome: Outcome) -> Outcome:
    return outcome


def _numbered(
    collected: Collected, spec: str, source: Source, num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """The labels as numbers, None unless every record has one, and the classes' names."""
    import torch

    labels: list[Any] = [entry.label for entry in collected.entries]
    if None in labels:
        return None, None
    names = source.class_names
    if strings := {label for label in labels if isinstance(label, str)}:
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{spec}: some class labels are numbers and some are names, as {min(strings)!r}")
        numbers, names = number_classes(sorted(strings), num_classes, class_names)
        if not numbers:
            return None, None
        labels = [numbers[label] for label in labels]
    names = _usable(names)
    return torch.tensor(labels), names if names is not None and max(labels) < len(names) else None


def _as_tensor(pixels: np.ndarray) -> Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        return torch.from_numpy(pixels)


def _usable(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Class names for a model: None if they are only the numbers. Classes that share a name get their numbers added, for
    ImageNet has two cranes."""
    if names is None or list(names) == [str(i) for i in range(len(names))]:
        return None
    counts = Counter(names)
    return tuple(f"{name}/{i}" if counts[name] > 1 else name for i, name in enumerate(names))


def _checked(label: Any, name: str) -> int | None:
    """A class label of the data set, or None."""
    if label is None or (type(label) is int and label >= 0):
        return label
    raise ValueError(f"{name}: class labels must be whole numbers from 0; got {label!r}")


def _array(image: Image.Image) -> np.ndarray:
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
