"""The names of the files that commands leave beside their results."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "COMPARISON",
    "FILM",
    "GRID",
    "OVERVIEWS",
    "RECORD",
    "RUN",
    "SAMPLES",
    "SPECTROGRAMS",
    "STATS",
    "is_overview",
]

# What a command did in a folder, and the pictures there that show all of it.
RECORD = "record.json"
GRID, SPECTROGRAMS, COMPARISON, FILM = "grid.png", "spectrograms.png", "comparison.png", "film.gif"
OVERVIEWS = (GRID, SPECTROGRAMS, COMPARISON, FILM)

# What version 0.1 called the record.
_FORMER = ("sampling.json", "restoration.json", "video.json", "interpolation.json", "edit.json", "errors.json")

# Of a training: its options, its losses, and the folder of grids of samples.
RUN, STATS, SAMPLES = "train.json", "stats.jsonl", "samples"


def is_overview(path: Path) -> bool:
    """Whether a file is the record of what a command of this package did in its folder, or a picture that shows it."""
    folder = path.parent
    if folder.name == SAMPLES and all((folder.parent / name).is_file() for name in (RUN, STATS)):
        return True
    if path.name in (RUN, STATS):
        return True
    records = [name for name in (RECORD, *_FORMER) if (folder / name).is_file()]
    return path.name in (*records, *OVERVIEWS) and bool(records)
