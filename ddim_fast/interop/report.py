"""The report of :func:`ddim_fast.accelerate`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Accelerated", "LeftAlone", "Report"]


@dataclass(frozen=True)
class Accelerated:
    """A replaced module or scheduler: its name in the model or pipeline, its class, and its present implementation."""

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class LeftAlone:
    """A module or component left alone: its name, its class, and the reason."""

    name: str
    kind: str
    why: str


@dataclass
class Report:
    """The modules that :func:`ddim_fast.accelerate` replaced and those it left alone; ``str`` is a summary.

    Attributes:
        engine: the engine that runs the network.
        replaced, left_alone: in the order of the walk through the model.
    """

    engine: str
    replaced: list[Accelerated] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists and strings."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"accelerated {len(self.replaced)} modules, engine {self.engine}"]
        lines += _grouped("replaced", [(r.kind, f"by {r.by}", r.name) for r in self.replaced])
        lines += _grouped("left alone", [(r.kind, f"because {r.why}", r.name) for r in self.left_alone])
        return "\n".join(lines)


def _grouped(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    """One line for each class and reason, with the first names. Rows are (class, reason, name)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, reason, name in rows:
        groups.setdefault((kind, reason), []).append(name)
    lines = [f"{title}:"] if groups else []
    for (kind, reason), names in groups.items():
        shown = ", ".join(n for n in names[:3] if n) + (", ..." if len(names) > 3 else "")
        lines.append(f"  {len(names):4d} {kind} {reason}" + (f" ({shown})" if shown else ""))
    return lines
