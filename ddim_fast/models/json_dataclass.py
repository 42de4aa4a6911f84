"""The base class of the dataclasses stored as config.json and audio.json."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["JsonDataclass"]


@dataclass(frozen=True, kw_only=True)
class JsonDataclass:
    """A dataclass that checks the types of its fields, because its JSON files are user input."""

    def __post_init__(self) -> None:
        for name, expected in self._types().items():
            object.__setattr__(self, name, _checked(name, expected, getattr(self, name)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`. Unknown keys are errors: a misspelt option must not silently change nothing.

        Raises:
            ValueError: a key is unknown or missing, or a value impossible; the message names the field.
        """
        types = cls._types()
        unknown = sorted(set(values) - set(types))
        if unknown:
            close = difflib.get_close_matches(unknown[0], types, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown configuration key {unknown[0]!r}{hint}")
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"the configuration lacks {field.name!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON: a default that changes later must not change an old checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def _require(self, holds: bool, name: str, right: str) -> None:
        """Raise a ValueError with the field, its value and the valid values, unless ``holds``."""
        if not holds:
            raise ValueError(f"{name} must be {right}; got {getattr(self, name)!r}")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 1, name, "at least 1")

    @classmethod
    @functools.cache
    def _types(cls) -> dict[str, Any]:
        return typing.get_type_hints(cls)


def _checked(name: str, expected: Any, value: Any) -> Any:
    """``value`` as the field's type, or a ValueError."""
    kinds = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    for kind in kinds:
        if kind in _LISTS:
            item, length, _ = _LISTS[kind]
            if isinstance(value, (list, tuple)) and all(_is(v, item) for v in value) and length in (None, len(value)):
                return tuple(value)
        elif kind is float:
            if type(value) in (int, float) and abs(value) <= sys.float_info.max:
                return float(value)
        elif _is(value, kind):
            return value
    right = " or ".join(_LISTS[kind][2] if kind in _LISTS else _NAMES[kind] for kind in kinds if kind is not type(None))
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    if any(type(number) is int and abs(number) >= _LARGEST for number in numbers):
        right += f" below {_LARGEST}"
    raise ValueError(f"{name} must be {right}; got {value!r}")


def _is(value: Any, kind: Any) -> bool:
    return type(value) is kind and (kind is not int or abs(value) < _LARGEST)


# No count comes near it, and sums and products of smaller numbers never overflow.
_LARGEST = 2**24

# The type of an item, the number of items, and their name in messages.
_LISTS = {
    tuple[int, ...]: (int, None, "a list of integers"),
    tuple[int, int]: (int, 2, "a pair of integers"),
    tuple[str, ...]: (str, None, "a list of strings"),
}
_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
