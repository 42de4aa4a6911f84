"""Names of the files that commands write beside a folder's images, which are not among them when the folder is read as data."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "GRID",
    "PICTURES",
    "RECORDS",
    "RESTORATION",
    "RUN",
    "SAMPLES",
    "SAMPLING",
    "SPECTROGRAMS",
    "STATS",
    "VIDEO",
    "is_overview",
]

SAMPLING, RESTORATION, VIDEO = "sampling.json", "restoration.json", "video.json"
GRID, SPECTROGRAMS = "grid.png", "spectrograms.png"

# The record of each kind of job that fills a folder, and the pictures of all its images that lie beside them.
PICTURES = {SAMPLING: (GRID, SPECTROGRAMS), RESTORATION: ("comparison.png",), VIDEO: ()}

# Of a training: its options, its losses, and the folder of grids of samples.
RUN, STATS, SAMPLES = "train.json", "stats.jsonl", "samples"

# The same of commands that fill a folder at once.
_OTHER_PICTURES = {
    "edit.json": ("comparison.png",),
    "errors.json": ("comparison.png",),
    "record.json": ("comparison.png",),
    "interpolation.json": (GRID, "film.gif"),
}

# All records: a folder read as data is not said to hold something that cannot be read for them.
RECORDS = {*PICTURES, *_OTHER_PICTURES, RUN, STATS}


def is_overview(path: Path) -> bool:
    """Whether a picture is one that a command of this package made to show what is, or what it did, in its folder."""
    folder = path.parent
    if folder.name == SAMPLES and all((folder.parent / name).is_file() for name in (RUN, STATS)):
        return True
    records = {**PICTURES, **_OTHER_PICTURES}.items()
    return any(path.name in names and (folder / record).is_file() for record, names in records)
