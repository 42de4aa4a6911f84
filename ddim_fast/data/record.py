"""The record of a training run's data, to resume with the same data."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..io.files import errors_name_file, read_json, write_json
from .images import ImageSet

__all__ = ["DATA_RECORD", "DataRecord"]

DATA_RECORD = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run, stored as ``data.json`` in its folder.

    Attributes:
        path: of the data set, absolute; or the name of one on the Hugging Face Hub.
        images: the number of images or sounds.
        classes: the number in each class, by its name, in the order of the classes' numbers; None if no class is used.
        files: the size of each file in bytes, by its name inside the data set; empty for a data set on the Hub.
        left_out: the records that could not be read: the place of each, and why.
    """

    path: str
    images: int
    classes: dict[str, int] | None
    files: dict[str, int]
    left_out: list[list[str]] = field(default_factory=list)

    @classmethod
    def of(cls, spec: str, data: ImageSet) -> DataRecord:
        """The record of data read from ``spec``. A class without a name gets its number as a name."""
        folder = Path(spec) if os.path.isdir(spec) else Path(spec).parent
        files: dict[str, int] = {}
        for place in data.places:
            is_file = os.path.isfile(place)
            file = place if is_file else re.split(r", (?:row|image) \d+", place)[0]  # "train.parquet, row 7"
            inside = os.path.relpath(file, folder)
            if inside not in files and (is_file or os.path.isfile(file)):
                files[inside] = os.path.getsize(file)
        left_out = [list(record) for record in data.left_out]
        if data.labels is None:
            return cls(spec, len(data), None, files, left_out)
        counts, names = Counter(data.labels.tolist()), data.class_names
        classes = {names[number] if names else str(number): counts[number] for number in range(max(counts) + 1)}
        return cls(spec, len(data), classes, files, left_out)

    @classmethod
    def load(cls, folder: Path) -> DataRecord | None:
        """The record in a run's folder; None in folders of earlier versions, which lack it.

        Raises:
            ValueError: it is damaged.
        """
        file = folder / DATA_RECORD
        if not file.is_file():
            return None
        values = {"left_out": [], **read_json(file)}  # which version 0.1 did not record
        with errors_name_file(file):
            kinds = {
                "path": _is_text,
                "images": _is_count,
                "classes": _are_counts_or_none,
                "files": _are_counts,
                "left_out": _are_pairs,
            }
            if values.keys() != kinds.keys() or not all(is_kind(values[name]) for name, is_kind in kinds.items()):
                raise ValueError("not the record of a run's data; without this file the run goes on with the data as it is")
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        write_json(folder / DATA_RECORD, asdict(self))

    def added(self, now: DataRecord) -> int:
        """The number of images in ``now`` that the run has not seen.

        Raises:
            ValueError: it lacks images that the run has seen, or its classes differ; the message says which.
        """
        if os.path.isabs(self.path) != os.path.isabs(now.path):
            raise ValueError(f"the run was trained on {self.path!r}, not on {now.path!r}")
        before, after = list(self.classes or ()), list(now.classes or ())
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            if one not in (other, str(number)):  # version 0.1 called classes of Parquet files by their numbers
                raise ValueError(f"class {number} of the run is {one!r}, but in {now.path} it is {other!r}")
        if len(before) != len(after):
            raise ValueError(f"the run has {len(before)} classes, {now.path} has {len(after)}")
        gone = [name for name, size in self.files.items() if now.files.get(name) != size]
        if gone:
            raise ValueError(
                f"{len(gone)} of the {len(self.files)} files of the run are gone from {now.path} or have changed, "
                f"{gone[0]!r} among them"
            )
        seen: list[tuple[str | None, int]] = [*zip(after, (self.classes or {}).values(), strict=True), (None, self.images)]
        for name, count in seen:
            left = now.images if name is None else (now.classes or {})[name]
            if left < count:
                of_class = "" if name is None else f" of class {name!r}"
                raise ValueError(f"the run has seen {count} images{of_class}, {now.path} has {left}")
        return now.images - self.images


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_counts_or_none(value: object) -> bool:
    return value is None or _are_counts(value)


def _are_pairs(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, list) and len(v) == 2 and all(map(_is_text, v)) for v in value)
