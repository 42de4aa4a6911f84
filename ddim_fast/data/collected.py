"""The records of a data set as they are read: what is kept of each besides its pixels, and which cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..io.files import one_line
from ..io.progress import count_of

__all__ = ["BadRecords", "Collected", "Entry", "Outcome", "Unreadable", "left_out_line"]

# Bad records that a line names.
_NAMED = 3


class Entry(NamedTuple):
    """A record that was read.

    Attributes:
        place: its file, or the data set's file and a number.
        label: its class, as a number or a name; None where it has none.
        size: width and height of the picture as stored.
    """

    place: str
    label: int | str | None
    size: tuple[int, int]


class Unreadable(NamedTuple):
    """A record that cannot be read, and why."""

    place: str
    error: Exception


# What became of a record: its (C, H, W) uint8 pixels beside its entry, or an error.
Outcome = tuple[Entry, np.ndarray] | Unreadable


class BadRecords:
    """Records that cannot be read, which are left out up to a number.

    Args:
        allowed: the number.

    Attributes:
        found: the place of each, and why it cannot be read.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.found: list[tuple[str, str]] = []

    def add(self, place: str, error: Exception) -> None:
        """Leave out a record.

        Raises:
            Exception: ``error``, where none is allowed.
            ValueError: it is one more than allowed.
        """
        if self.allowed == 0:
            raise error
        self.found.append((place, one_line(error)))
        if len(self.found) > self.allowed:
            raise ValueError(f"{one_line(error)}; {len(self.found)} records cannot be read, and --max-bad is {self.allowed}")


class Collected:
    """The records of a data set in their order.

    Args:
        check: raises where a record does not fit the first one.
        max_bad: the number of records that may be left out.

    Attributes:
        entries: those that were read.
        bad: the others.
    """

    def __init__(self, check: Callable[[Entry, Entry], None], max_bad: int) -> None:
        self._check = check
        self.entries: list[Entry] = []
        self.bad = BadRecords(max_bad)

    def add(self, outcome: Outcome | tuple[Entry, None]) -> None:
        """Add the next record; its pixels are not looked at.

        Raises:
            Exception: it cannot be read and may not be left out.
            ValueError: it does not fit the first one.
        """
        if isinstance(outcome, Unreadable):
            self.bad.add(*outcome)
            return
        entry = outcome[0]
        self._check(self.entries[0] if self.entries else entry, entry)
        self.entries.append(entry)


def left_out_line(spec: str, left_out: Sequence[tuple[str, str]]) -> str | None:
    """How many records of a data set were left out, and which were the first, in one line; None where there were none."""
    if not left_out:
        return None
    places = [place for place, _ in left_out[:_NAMED]]
    more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
    return f"{spec}: {count_of(len(left_out), 'records')} that cannot be read left out: {'; '.join(places)}{more}"
