"""Parquet files in the layout of the Hugging Face Hub: a column of encoded files and columns of their labels."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..io.files import check_expansion, one_line, visible_files

__all__ = ["encoded", "parquet_class_names", "parquet_files", "read_parquet"]


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder: those in it, or those of a Hub data set inside it, as ``data/train-*`` or
    ``NAME/train/*``; only the training part if some are named ``train*``.

    Raises:
        ValueError: several such data sets lie in it.
    """
    found = [path for path in visible_files(folder) if path.suffix.lower() == ".parquet"]
    inside = [path for path in found if path.parent == folder]
    if not inside:
        inside = [p for p in found if p.parent.name in ("data", "train") or p.name.startswith("train")]
        places = sorted({str(path.parent) for path in inside})
        if len(places) > 1:
            raise ValueError(f"{folder} holds several data sets; name one of them: {', '.join(places)}")
    return sorted([path for path in inside if path.name.startswith("train")] or inside)


def read_parquet(paths: list[Path], content: tuple[str, ...], *columns: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """The rows of Parquet files: a name for messages, the encoded file, which :func:`encoded` checks, and the values of
    ``columns``, None for missing columns.

    Args:
        paths: the files.
        content: names that the column of encoded files may have, such as ``("image", "img")``.
        columns: names that each of the others may have.

    Raises:
        ValueError: a file is damaged or lacks the content, or pyarrow is missing.
    """
    for path in paths:
        for row, (value, *others) in enumerate(_records(path, content, *columns)):
            yield f"{path}, row {row}", value.get("bytes") if isinstance(value, dict) else value, *others


def encoded(place: str, data: Any, kind: str) -> bytes:
    """The encoded file of a row.

    Args:
        place: the row, for messages.
        data: as stored.
        kind: what it should be, such as "image".

    Raises:
        ValueError: it is none.
    """
    if not isinstance(data, bytes):
        raise ValueError(f"{place}: its column has no encoded {kind}")
    return data


def parquet_class_names(path: Path, columns: tuple[str, ...]) -> list[str] | None:
    """The class names of a label column, by number, from the features that the Hugging Face Hub stores; None if there are none.

    Args:
        path: a file of the data set.
        columns: names that the column may have.

    Raises:
        ValueError: the file is damaged, or pyarrow is missing.
    """
    schema = _open(path).schema_arrow
    column = next((name for name in columns if name in schema.names), None)
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):  # no metadata, or another program's
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _records(path: Path, *names: tuple[str, ...]) -> Iterator[list[Any]]:
    """The values of each row, in the order of the columns' names."""
    file = _open(path)
    there = file.schema_arrow.names
    picked = [next((n for n in called if n in there), None) for called in names]
    if picked[0] is None:
        raise ValueError(f"{path}: no column {names[0][0]!r} (there are {', '.join(map(repr, there))})")
    with _whole(path):
        # The columns' metadata are not read: damaged ones make pyarrow end the process.
        for group in range(file.num_row_groups):
            check_expansion(path.stat().st_size, file.metadata.row_group(group).total_byte_size)
        for batch in file.iter_batches(16, columns=[name for name in picked if name]):  # photographs have megabytes each
            for record in batch.to_pylist():
                yield [None if name is None else record[name] for name in picked]


def _open(path: Path) -> Any:
    """A pyarrow ParquetFile whose schema can be read."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise ModuleNotFoundError("reading Parquet needs pyarrow: pip install 'ddim_fast[train]'") from None
    with _whole(path):
        file = pq.ParquetFile(path)
        _ = file.schema_arrow
    return file


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, any error is a ValueError about the file in one line: pyarrow raises many kinds."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: not a whole Parquet file ({one_line(error)}); copy or download it again") from None
