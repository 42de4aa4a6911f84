"""Names of the files that commands write beside a folder's images, which are not among them when the folder is read as data."""

from __future__ import annotations

from pathlib import Path

__all__ = ["GRID", "PICTURES", "RESTORATION", "RUN", "SAMPLES", "SAMPLING", "SPECTROGRAMS", "STATS", "VIDEO", "is_of_run"]

SAMPLING, RESTORATION, VIDEO = "sampling.json", "restoration.json", "video.json"
GRID, SPECTROGRAMS = "grid.png", "spectrograms.png"

# The record of each kind of job that fills a folder, and the pictures of all its images that lie beside them.
PICTURES = {SAMPLING: (GRID, SPECTROGRAMS), RESTORATION: ("comparison.png",), VIDEO: ()}

# Of a training: its options, its losses, and the folder of grids of samples.
RUN, STATS, SAMPLES = "train.json", "stats.jsonl", "samples"


def is_of_run(picture: Path) -> bool:
    """Whether a picture is a grid of samples that a training wrote."""
    folder = picture.parent
    return folder.name == SAMPLES and all((folder.parent / name).is_file() for name in (RUN, STATS))
