"""Names of the files that commands write beside a folder's images, which are not among them when the folder is read as data."""

from __future__ import annotations

__all__ = ["GRID", "PICTURES", "RESTORATION", "SAMPLING", "SPECTROGRAMS", "VIDEO"]

SAMPLING, RESTORATION, VIDEO = "sampling.json", "restoration.json", "video.json"
GRID, SPECTROGRAMS = "grid.png", "spectrograms.png"

# The record of each kind of job that fills a folder, and the pictures of all its images that lie beside them.
PICTURES = {SAMPLING: (GRID, SPECTROGRAMS), RESTORATION: ("comparison.png",), VIDEO: ()}
