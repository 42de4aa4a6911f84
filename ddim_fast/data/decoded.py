"""Images decoded once into a file that is mapped into memory, for data sets that do not fit there."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..io.files import atomic_write, cache_folder, errors_name_place, one_line
from ..io.locks import holding
from .collected import Collected, Entry, Outcome, Unreadable

__all__ = ["DecodedFile"]

# Counts up when images are decoded, or written, in another way.
_FORMAT = 1

# Bytes of images that are written, flushed to disk and checksummed together: what a killed process loses at most.
_BLOCK = 2**24

_PIXELS, _INDEX = "images.u8", "index.jsonl"


@dataclass
class _Stored:
    """What is whole in the folder.

    Attributes:
        lines: of the index.
        outcomes: of the records, in their order.
        images: the number of images among them.
        is_all: whether no record is missing.
    """

    lines: list[bytes] = field(default_factory=list)
    outcomes: list[tuple[Entry, None] | Unreadable] = field(default_factory=list)
    images: int = 0
    is_all: bool = False

    def hand_to(self, collected: Collected) -> None:
        """Add the records to ``collected``."""
        for outcome in self.outcomes:
            collected.add(outcome)


class DecodedFile:
    """The decoded images of a data set, in a folder ``decoded/NAME-KEY`` of :func:`ddim_fast.io.files.cache_folder`: the pixels
    one after the other in one file, and an index, whose lines carry checksums, in another. The key depends on the data set's
    name and on how it is read.

    A killed process has kept what it had decoded, in blocks of 16 MiB; the next one goes on there. What is damaged is decoded
    again. One process decodes, others wait for it.

    Args:
        spec: the data set, as users name it.
        shape: (C, H, W) of an image.
        files: the data set's files. Their names, sizes and times of change must be those that were decoded.
        reading: what else the pixels or labels depend on, as JSON takes it.
    """

    def __init__(self, spec: str, shape: tuple[int, int, int], files: Sequence[Path], reading: Mapping[str, Any]) -> None:
        place = os.path.abspath(spec) if Path(spec).parent.is_dir() else spec  # the name of a hub data set
        identity = json.dumps([_FORMAT, place, shape, reading], sort_keys=True)
        name = re.sub(r"[^\w.-]+", "-", Path(spec).name)[:80]
        self.folder = cache_folder() / "decoded" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        self._spec, self._shape, self._files = spec, shape, files
        self._image_bytes = int(np.prod(shape))

    @property
    def is_begun(self) -> bool:
        """Whether some process has begun to decode this data set."""
        return (self.folder / _INDEX).is_file()

    def load(self, work: Iterator[Callable[[], Outcome]], collected: Collected) -> np.ndarray:
        """(N, C, H, W) uint8, mapped read-only.

        Args:
            work: decodes one record after the other; those that are in the file are not decoded again.
            collected: gets the records.

        Raises:
            ValueError: the data set has changed since it was decoded, or ``collected`` does not take a record.
        """
        stored = self._stored()
        if stored.is_all:
            stored.hand_to(collected)
        else:
            with holding(self.folder, f"the decoded images in {self.folder}"):
                stored = self._stored()  # another process may have decoded them meanwhile
                stored.hand_to(collected)
                if not stored.is_all:
                    self._decode(stored, work, collected)
        count = len(collected.entries)
        if not count:
            return np.empty(0, np.uint8)
        # Read-only: of a private mapping that may be written to, Linux grants no more than there is memory.
        return np.memmap(self.folder / _PIXELS, np.uint8, "r", shape=(count, *self._shape))

    def _decode(self, stored: _Stored, work: Iterator[Callable[[], Outcome]], collected: Collected) -> None:
        """Decode the records that are missing, and add them to the file and to ``collected``."""
        print(f"{self._spec} is decoded once, into {self.folder} (XDG_CACHE_HOME names another place)", file=sys.stderr)
        lines = stored.lines or [_line({"files": _states(self._files)})]
        atomic_write(self.folder / _INDEX, b"".join(lines))
        with errors_name_place(self.folder / _PIXELS):
            descriptor = os.open(self.folder / _PIXELS, os.O_RDWR | os.O_CREAT, 0o666)
        # Written over what is there, which another process may have mapped: the bytes are the same.
        with os.fdopen(descriptor, "r+b") as pixels, open(self.folder / _INDEX, "ab") as index:
            pixels.seek(stored.images * self._image_bytes)
            block: list[Outcome] = []
            size = 0
            for decode in itertools.islice(work, len(stored.outcomes), None):
                block.append(decode())
                collected.add(block[-1])
                size += self._image_bytes
                if size >= _BLOCK:
                    self._write(block, pixels, index)
                    block, size = [], 0
            self._write(block, pixels, index)
            pixels.truncate()
            with errors_name_place(self.folder / _INDEX):
                index.write(_line({"images": len(collected.entries)}))

    def _write(self, block: list[Outcome], pixels: Any, index: Any) -> None:
        data = b"".join(outcome[1].tobytes() for outcome in block if not isinstance(outcome, Unreadable))
        with errors_name_place(self.folder / _PIXELS):
            pixels.write(data)
            pixels.flush()
            os.fsync(pixels.fileno())
        with errors_name_place(self.folder / _INDEX):
            index.write(_line({"records": [_record(outcome) for outcome in block], "crc32": zlib.crc32(data)}))
            index.flush()

    def _stored(self) -> _Stored:
        """What is whole: the lines of the index up to the first that is damaged, or whose images are.

        Raises:
            ValueError: other files were decoded.
        """
        stored = _Stored()
        index, pixels = self.folder / _INDEX, self.folder / _PIXELS
        lines = index.read_bytes().splitlines(keepends=True) if index.is_file() else []
        header = _values(lines[0]) if lines else None
        if header is None:
            return stored
        self._check_source(header["files"])
        stored.lines.append(lines[0])
        if not pixels.is_file():
            return stored
        with open(pixels, "rb") as file:
            for line in lines[1:]:
                values = _values(line)
                if values is None or "images" in values:
                    stored.is_all = values == {"images": stored.images}
                    break
                outcomes = [_outcome(*record) for record in values["records"]]
                images = sum(not isinstance(outcome, Unreadable) for outcome in outcomes)
                if zlib.crc32(file.read(images * self._image_bytes)) != values["crc32"]:
                    break
                stored.lines.append(line)
                stored.outcomes += outcomes
                stored.images += images
        return stored

    def _check_source(self, before: dict[str, Any]) -> None:
        now = _states(self._files)
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if changed:
            raise ValueError(
                f"{self._spec} has changed since it was decoded into {self.folder}: {changed[0]!r}, of {len(changed)} files; "
                "remove that folder to decode the data again"
            )


def _states(files: Sequence[Path]) -> dict[str, list[int] | None]:
    """Size and time of change of each file; None where it is gone."""
    states: dict[str, list[int] | None] = {}
    for file in files:
        try:
            state = file.stat()
            states[os.path.abspath(file)] = [state.st_size, state.st_mtime_ns]
        except OSError:
            states[os.path.abspath(file)] = None
    return states


def _line(values: dict[str, Any]) -> bytes:
    """A line of the index: its checksum and the values."""
    text = json.dumps(values).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _values(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None where it is damaged."""
    text = line[9:-1]
    return json.loads(text) if line == b"%08x %b\n" % (zlib.crc32(text), text) else None


def _record(outcome: Outcome) -> list[Any]:
    if isinstance(outcome, Unreadable):
        return [outcome.place, one_line(outcome.error)]
    entry = outcome[0]
    return [entry.place, entry.label, *entry.size]


def _outcome(place: str, what: Any, *size: int) -> tuple[Entry, None] | Unreadable:
    """The inverse of :func:`_record`."""
    return (Entry(place, what, (size[0], size[1])), None) if size else Unreadable(place, ValueError(what))
