"""Names of the files that commands write beside a folder's images, which are not among them when the folder is read as data."""

from __future__ import annotations

__all__ = [
    "COMPARISON",
    "EDITING",
    "FILM",
    "GRID",
    "INTERPOLATION",
    "OVERVIEWS",
    "PICTURES",
    "RECONSTRUCTION",
    "RECORD",
    "RESTORATION",
    "SAMPLING",
    "SPECTROGRAMS",
    "VIDEO",
]

SAMPLING, RESTORATION, VIDEO = "sampling.json", "restoration.json", "video.json"
INTERPOLATION, EDITING, RECONSTRUCTION, RECORD = "interpolation.json", "edit.json", "errors.json", "record.json"
GRID, SPECTROGRAMS, COMPARISON, FILM = "grid.png", "spectrograms.png", "comparison.png", "film.gif"

# The record of each kind of job that fills a folder, and the pictures of all its images that lie beside them.
PICTURES = {SAMPLING: (GRID, SPECTROGRAMS), RESTORATION: (COMPARISON,), VIDEO: ()}

# The same of every command that writes a folder of images.
OVERVIEWS = {
    **PICTURES,
    INTERPOLATION: (GRID, FILM),
    EDITING: (COMPARISON,),
    RECONSTRUCTION: (COMPARISON,),
    RECORD: (COMPARISON,),
}
