"""The names of the files that commands leave beside their results."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "COMPARISON",
    "EDITING",
    "FILM",
    "GRID",
    "INTERPOLATION",
    "PICTURES",
    "RECONSTRUCTION",
    "RECORD",
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
INTERPOLATION, EDITING, RECONSTRUCTION, RECORD = "interpolation.json", "edit.json", "errors.json", "record.json"
GRID, SPECTROGRAMS, COMPARISON, FILM = "grid.png", "spectrograms.png", "comparison.png", "film.gif"

# Of a training: its options, its losses, and the folder of grids of samples.
RUN, STATS, SAMPLES = "train.json", "stats.jsonl", "samples"

# The record of each kind of job that fills a folder, and the pictures of all its images that lie beside them.
PICTURES = {SAMPLING: (GRID, SPECTROGRAMS), RESTORATION: (COMPARISON,), VIDEO: ()}

# The same of every command that writes a folder of images.
_OVERVIEWS = {
    **PICTURES,
    INTERPOLATION: (GRID, FILM),
    EDITING: (COMPARISON,),
    RECONSTRUCTION: (COMPARISON,),
    RECORD: (COMPARISON,),
}


def is_overview(path: Path) -> bool:
    """Whether a file is the record of what a command of this package did in its folder, or a picture that shows it."""
    folder = path.parent
    if folder.name == SAMPLES and all((folder.parent / name).is_file() for name in (RUN, STATS)):
        return True
    if path.name in (RUN, STATS):
        return True
    return any(path.name in (record, *names) and (folder / record).is_file() for record, names in _OVERVIEWS.items())
