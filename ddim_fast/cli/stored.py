"""The stored options of a resumed run, parsed as a command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .parser import CommandParser

__all__ = ["stored_options"]


def stored_options(
    parser: CommandParser, record: Path, required: list[str], known: set[str], update: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The options in ``record``, checked and converted as words of a command.

    Args:
        required: words that every command line needs.
        known: the options that a record may have.
        update: converts a record of an earlier version.

    Raises:
        ValueError: the record is damaged, or has options that this version lacks.
    """
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
        update(values)
        words = [word for name, value in values.items() for word in _words(name, value)]
        unknown = sorted(values.keys() - known)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{record}: not the record of a run ({error}); begin another in another --out") from None
    if unknown:
        raise ValueError(
            f"{record}: not the record of a run (there is no option {unknown[0]!r}); begin another in another --out"
        )
    hint, parser.hint = parser.hint, f"as {record} says"
    own = vars(parser.parse_args([*words, *required]))
    parser.hint = hint
    return {name: own[name] for name in values}


def _words(name: str, value: Any) -> list[str]:
    """An option and its value as words of a command line."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option] if value else ["--no-flip"] if name == "flip" else []
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return [option, *value] if value else []
    if value is None or isinstance(value, (str, int, float)):
        return [] if value is None else [f"{option}={value}"]
    raise TypeError(f"{name} is {value!r}")
