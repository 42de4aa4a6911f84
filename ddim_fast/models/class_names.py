"""Which classes a name means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

__all__ = ["named_classes", "similar_name"]


def named_classes(text: str, names: Sequence[str]) -> list[int]:
    """The numbers of the classes that ``text`` names: the one of this name, or else all that have it as a part, as
    "7/jackson" has "7" and "jackson"; none where there is no such name. Capitals decide only between names that are the same
    but for them.

    Args:
        text: what a user wrote.
        names: of the classes, in the order of their numbers. Slashes and commas separate the parts of a name.
    """
    wanted, folded = text.strip().casefold(), [name.casefold() for name in names]
    return (
        [i for i, name in enumerate(names) if name == text]
        or [i for i, name in enumerate(folded) if name == wanted]
        or [i for i, name in enumerate(folded) if wanted in _parts(name)]
    )


def similar_name(text: str, names: Sequence[str]) -> str | None:
    """The name, or the part of one, that looks most like ``text``, or has it in it; None where none does."""
    wanted = text.strip().casefold()
    known = {part.casefold(): part for name in names for part in (name, *_parts(name))}
    close = difflib.get_close_matches(wanted, known, n=1) or [part for part in known if wanted and wanted in part]
    return known[close[0]] if close else None


def _parts(name: str) -> list[str]:
    return [part.strip() for part in re.split("[/,]", name)]
