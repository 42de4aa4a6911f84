"""Every pair of options instead of every combination: most faults show where two options meet (Kuhn, Wallace and Gallo 2004,
"Software fault interactions and implications for software testing")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Values = Mapping[str, Any] | Sequence[Any]


def every_pair(**options: Values) -> pytest.MarkDecorator:
    """Parametrises a test such that any two values of different options meet in at least one case.

    Args:
        options: the values of each argument, as a list, or by the names that the cases get.
    """
    named = [dict(v) if isinstance(v, Mapping) else {_name(value): value for value in v} for v in options.values()]
    cases = [
        pytest.param(*(values[name] for values, name in zip(named, row, strict=True)), id="-".join(row))
        for row in _rows([list(values) for values in named])
    ]
    return pytest.mark.parametrize(",".join(options), cases)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _rows(options: list[list[str]]) -> list[tuple[str, ...]]:
    """A small set of rows, one value an option, with all pairs: each takes the combination with most pairs that are missing."""
    columns = range(len(options))
    missing = {((i, a), (j, b)) for i, j in combinations(columns, 2) for a, b in product(options[i], options[j])}
    candidates = list(product(*options))
    rows = []
    while missing:
        row = max(candidates, key=lambda row: len(missing.intersection(combinations(enumerate(row), 2))))
        missing.difference_update(combinations(enumerate(row), 2))
        rows.append(row)
    return rows
