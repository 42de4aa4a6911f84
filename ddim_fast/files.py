"""Files: written so that nothing is ever left half-written, and named in errors about what they hold."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "naming",
    "one_line",
    "read_json",
    "require_file",
    "visible_files",
    "write_json",
]


def atomic_write(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: written beside its place, flushed to disk, then renamed over it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    require_file(path)
    with naming(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values``, whole or not at all."""
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill: beside the place of ``folder``, renamed to it at the end, and removed if anything goes wrong. An
    empty folder that is there already may be a mount or a link, which cannot be replaced, and is filled in the same way.

    Raises:
        FileExistsError: ``folder`` exists and is not an empty folder.
    """
    exists = folder.exists()
    if exists and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder if exists else folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if exists:
            for new in temporary.iterdir():
                os.replace(new, folder / new.name)
            temporary.rmdir()
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those inside it, links to folders among them, but for hidden files and folders."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def require_file(path: Path) -> None:
    """See that a checkpoint's folder has this file.

    Raises:
        FileNotFoundError: it has not.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a checkpoint: it has no {path.name}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, a ValueError is about the content of ``path``, and says so."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What a library says, for an error of ours to quote."""
    return " ".join(str(error).split())


def cache_folder() -> Path:
    """Where what can be made again is kept: ``ddim_fast`` in XDG_CACHE_HOME, or in ~/.cache. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim_fast"


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
