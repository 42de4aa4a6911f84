"""Files that are written whole or not at all, and named in errors about their content."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from .records import OVERVIEWS

__all__ = [
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "check_expansion",
    "errors_name_file",
    "errors_name_place",
    "is_hidden",
    "item_names",
    "numbers",
    "one_line",
    "read_json",
    "remove_remains",
    "require_file",
    "visible_files",
    "warn_of_skipped",
    "warn_once",
    "write_json",
]

# Folders that Mac archives, Synology storage and file systems put beside pictures and sounds.
_LEFTOVERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}

# Bytes; the index of a large network's weights has a hundredth of it. Read, it takes some ten times as much memory.
_LARGEST_JSON = 2**26


def atomic_write(path: Path, data: bytes | memoryview) -> None:
    """Replace ``path`` by ``data``: written beside its place, flushed to disk, then renamed over it."""
    with errors_name_place(path):
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
        ValueError: it is damaged, or far larger than any that this package or diffusers writes.
    """
    require_file(path)
    with errors_name_file(path):
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and the largest such file has {_LARGEST_JSON:,}; name another file")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write ``values``, whole or not at all."""
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, beside ``folder``: renamed to it at the end, removed after an error. An existing empty folder may
    be a mount or a link, which cannot be replaced; the files are moved into it.

    Raises:
        FileExistsError: ``folder`` exists and is not an empty folder.
    """
    exists = folder.exists()
    if exists and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with errors_name_place(folder):
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


def remove_remains(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what :func:`atomic_write` and :func:`atomic_folder` had begun in ``folder`` when their process was killed. No
    other process may be writing there.

    Args:
        is_ours: whether a file or a folder, as it would have been called, may be removed.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        remains = re.fullmatch(r"\.(.+)\.\w{8}", path.name)  # as tempfile calls them
        if remains and is_ours(remains[1]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def errors_name_place(path: Path) -> Iterator[None]:
    """Inside, an OSError is about ``path``, and names it: it has no name, or a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name does not belong to a data set."""
    return name.startswith(".") or name in _LEFTOVERS


def visible_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders, without hidden ones and leftovers of file systems and archives.

    Links to folders are followed, except to a parent folder of the link or to a folder already listed: every file comes once,
    from its own place if that is inside."""
    seen: set[str] = set()
    folders: list[Path] = [folder]
    links: list[Path] = []
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        here = os.path.realpath(place)
        if here in seen:
            continue
        seen.add(here)
        with os.scandir(place) as entries:
            visible = sorted((e for e in entries if not is_hidden(e.name)), key=lambda e: e.name)
        for entry in visible:
            path = Path(place, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_symlink() and path.is_dir():
                target = os.path.realpath(path)
                if not any(Path(inner).is_relative_to(target) for inner in (here, os.path.realpath(folder))):
                    links.append(path)
            elif entry.is_symlink() or entry.is_file():  # no pipe, which could block
                yield path


def warn_of_skipped(folder: Path, files: Collection[Path], what: str) -> None:
    """Warn, once, how many files of a folder are skipped because they are not ``what`` is read there."""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in files)
    if kinds:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        warn_once(f"{folder}: skipped files that cannot be read as {what}: {listed}")


@functools.cache
def warn_once(text: str) -> None:
    """A warning that a process gives once, under any warning filters."""
    warnings.warn(text, stacklevel=2)


def check_expansion(stored: int, expanded: int, usual: int = 100) -> None:
    """Check that compressed data are no decompression bomb before they are expanded.

    Args:
        stored: their size in bytes.
        expanded: their expanded size in bytes, as they state it.
        usual: the largest allowed ratio of the two.

    Raises:
        ValueError: the ratio is larger, and the expanded size is over 256 MiB.
    """
    if expanded > 2**28 and expanded > usual * stored:
        raise ValueError(f"its {stored} bytes would become {expanded}: a decompression bomb")


def require_file(path: Path) -> None:
    """Check that a checkpoint folder has this file.

    Raises:
        FileNotFoundError: it lacks the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a checkpoint: it has no {path.name}")


@contextlib.contextmanager
def errors_name_file(path: Path) -> Iterator[None]:
    """Inside, a ValueError is about the content of ``path``, and gets its name."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        reason = f"not whole JSON ({error})" if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise ValueError(f"{path}: {reason}") from None


def one_line(error: Exception) -> str:
    """A library's message in one line, to quote in an error; an object in memory is named by its type alone."""
    return re.sub(r"<(\S+) object at 0x[0-9a-f]+>", r"\1", " ".join(str(error).split()))


def cache_folder() -> Path:
    """The cache folder, ``ddim_fast`` in XDG_CACHE_HOME or ~/.cache, for files that can be made again. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddim_fast"


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def numbers(count: int) -> list[str]:
    """The numbers from 0, as names in the same sort order."""
    digits = len(str(count - 1))
    return [f"{i:0{digits}d}" for i in range(count)]


def item_names(places: Sequence[str]) -> list[str]:
    """Names, without a suffix, for the results of some files: the file's own name, NAME-2 for a second file of that name, and
    the number for a row of a data set."""
    names: list[str] = []
    taken = {Path(name).stem for name in OVERVIEWS}
    for i, place in enumerate(places):
        name = own = Path(place).stem if Path(place).is_file() else f"{i:06d}"
        number = 1
        while name in taken:
            number += 1
            name = f"{own}-{number}"
        taken.add(name)
        names.append(name)
    return names
