"""Parquet files in the layout of the Hugging Face Hub: a column of encoded files, beside columns of what is known of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["read_parquet"]


def read_parquet(paths: list[Path], content: tuple[str, ...], *columns: tuple[str, ...]) -> Iterator[tuple]:
    """The rows of Parquet files: a name for messages, the encoded file, and the values of ``columns``, None where there is no
    such column.

    Args:
        paths: the files.
        content: names that the column of encoded files may have, such as ``("image", "img")``.
        columns: names that each of the others may have.

    Raises:
        ValueError: a file is damaged or has no such content, or pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install 'ddim_fast[train]'") from None
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            picked = [_pick(file, names) for names in (content, *columns)]
            if picked[0] is None:
                raise ValueError(f"{path}: no column {content[0]!r} (there are {', '.join(file.schema_arrow.names)})")
            row = 0
            for batch in file.iter_batches(512, columns=[c for c in picked if c]):
                for record in batch.to_pylist():
                    name = f"{path}, row {row}"
                    value, *others = (record[column] if column else None for column in picked)
                    data = value.get("bytes") if isinstance(value, dict) else value
                    if not isinstance(data, bytes):
                        raise ValueError(f"{name}: no encoded {content[0]} in column {picked[0]!r}")
                    yield name, data, *others
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a whole Parquet file ({error})") from None


def _pick(file: Any, names: tuple[str, ...]) -> str | None:
    return next((n for n in names if n in file.schema_arrow.names), None)
