"""The names of the files that commands leave beside their results."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "BAD_STEPS",
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

# The record of a command in its folder, and the overview pictures beside it.
RECORD = "record.json"
GRID, SPECTROGRAMS, COMPARISON, FILM = "grid.png", "spectrograms.png", "comparison.png", "film.gif"
OVERVIEWS = (GRID, SPECTROGRAMS, COMPARISON, FILM)

# The record's name in version 0.1.
_FORMER = ("sampling.json", "restoration.json", "video.json", "interpolation.json", "edit.json", "errors.json")

# A training's options, losses, steps without a finite loss, and folder of sample grids.
RUN, STATS, BAD_STEPS, SAMPLES = "train.json", "stats.jsonl", "bad_steps.jsonl", "samples"


def is_overview(path: Path) -> bool:
    """Whether a file is a record or an overview picture that a command of this package wrote."""
    folder = path.parent
    if folder.name == SAMPLES and all((folder.parent / name).is_file() for name in (RUN, STATS)):
        return True
    if path.name in (RUN, STATS):
        return True
    records = [name for name in (RECORD, *_FORMER) if (folder / name).is_file()]
    return path.name in (*records, *OVERVIEWS) and bool(records)
