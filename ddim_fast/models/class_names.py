"""Class numbers from names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

__all__ = ["named_classes", "similar_name"]


def named_classes(text: str, names: Sequence[str]) -> list[int]:
    """The numbers of the classes that ``text`` names: the class of this name, or else all with it as a part, as "7/jackson" has
    "7" and "jackson"; empty without such a name. Case decides only between names that differ in nothing else.

    Args:
        text: a user's name for classes.
        names: class names, in the order of their numbers. Slashes and commas separate the parts of a name.
    """
    wanted, folded = text.strip().casefold(), [name.casefold() for name in names]
    return (
        [i for i, name in enumerate(names) if name == text]
        or [i for i, name in enumerate(folded) if name == wanted]
        or [i for i, name in enumerate(folded) if wanted in _parts(name)]
    )


def similar_name(text: str, names: Sequence[str]) -> str | None:
    """The name, or part of a name, that is most similar to ``text`` or contains it; None if there is none."""
    wanted = text.strip().casefold()
    known = {part.casefold(): part for name in names for part in (name, *_parts(name))}
    close = difflib.get_close_matches(wanted, known, n=1) or [part for part in known if wanted and wanted in part]
    return known[close[0]] if close else None


def _parts(name: str) -> list[str]:
    return [part.strip() for part in re.split("[/,]", name)]
