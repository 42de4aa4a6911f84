"""The results of evaluations: one JSON file that grows, and the tables and plots made from it."""

from __future__ import annotations

import io
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..io.files import atomic_write, errors_name_file, one_line, read_json, remove_remains, write_json
from ..io.locks import holding
from .inception import NAME

__all__ = ["Results", "fid_label", "machine"]

Row = dict[str, Any]

_REMEDY = "restore the file from a copy, or name another --out"

# FID's usual number of images. With fewer, FID is larger and not comparable.
_USUAL = 50_000


def fid_label(images: int) -> str:
    """``FID`` from 50,000 images or more; ``FID-2k`` from 2,000, ``FID-1234`` from 1,234."""
    if images >= _USUAL:
        return "FID"
    return f"FID-{images // 1000}k" if images % 1000 == 0 and images else f"FID-{images}"


def machine(device: torch.device) -> str:
    """The hardware: the GPU, or the CPU and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"{cpu}, {torch.get_num_threads()} threads"


class Results:
    """``evaluation.json`` in a folder: rows of several kinds, and the runs that made them. Existing rows are not measured
    again, so a stopped evaluation continues. Another evaluation may add rows, even at the same time.

    Args:
        folder: the folder, which may not exist yet.

    Raises:
        ValueError: its ``evaluation.json`` is damaged or another program's; the message names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "evaluation.json"
        self._read()
        try:
            self.markdown().encode()  # needs every field of a row
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self._path}: a row or run in it is damaged ({one_line(error)}); {_REMEDY}") from None

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return self._content["rows"]

    def find(self, kind: str, settings: dict[str, Any]) -> Row | None:
        """The row of this kind with these settings, or None."""
        self._read()
        return next((row for row in self.rows if row["kind"] == kind and row["settings"] == settings), None)

    def add(self, kind: str, settings: dict[str, Any], found: dict[str, Any], run: dict[str, Any]) -> Row:
        """Add a row and write it at once; a row of these settings that is there stays.

        Args:
            kind: ``quality``, ``reconstruction``, ``loss`` or ``trajectory``.
            settings: the settings that decide the numbers.
            found: the numbers.
            run: the command, machine and versions that made them.
        """
        with holding(self.folder, f"--out {self.folder}"):
            self._remove_remains()
            if (there := self.find(kind, settings)) is not None:
                return there
            if run not in self._content["runs"]:
                self._content["runs"].append(run)
            row = {"kind": kind, "settings": settings, "run": self._content["runs"].index(run) + 1, **found}
            self.rows.append(row)
            write_json(self._path, self._content)
        return row

    def report(self) -> list[Path]:
        """Write ``evaluation.md`` and, with matplotlib, one picture per kind; returns the files."""
        with holding(self.folder, f"--out {self.folder}"):
            self._remove_remains()
            self._read()
            path = self.folder / "evaluation.md"
            atomic_write(path, self.markdown().encode())
            return [path, *self._draw()]

    def markdown(self) -> str:
        """All rows as tables, with the runs listed below them."""
        parts = []
        for title, rows in self._groups():
            columns = _COLUMNS[rows[0]["kind"]]
            lines = [
                f"| {' | '.join(name if name != 'FID' else rows[0]['label'] for name in columns)} |",
                "|---" * len(columns) + "|",
            ]
            lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
            missing = dict.fromkeys(row["not measured"] for row in rows if "not measured" in row)
            lines += ["", *(f"Not measured: {text}." for text in missing)] if missing else []
            parts.append(f"### {title}\n\n" + "\n".join(lines) + "\n")
        runs = [
            f"{i}. {run['machine']}; ddim_fast {run['ddim_fast']}, torch {run['torch']}: `{run['command']}`"
            for i, run in enumerate(self._content["runs"], 1)
        ]
        return "\n".join([*parts, "Runs:\n", *runs]) + "\n"

    def _read(self) -> None:
        """The rows in the file now; other evaluations may have written some."""
        self._content: dict[str, Any] = read_json(self._path) if self._path.exists() else {"runs": [], "rows": []}
        with errors_name_file(self._path):
            runs, rows = (self._content.get(name) for name in ("runs", "rows"))
            if not (isinstance(runs, list) and isinstance(rows, list) and all(map(_is_row, rows))):
                raise ValueError(f"not the results of an evaluation; {_REMEDY}")

    def _remove_remains(self) -> None:
        remove_remains(self.folder, lambda name: name.endswith((".json", ".md", ".png")))

    def _groups(self) -> list[tuple[str, list[Row]]]:
        """Comparable rows under their title, each with the name of its ``network``."""
        titles = _told_apart([(_TITLES[row["kind"]](row), _setting(row, *_DATA_CONTENTS)) for row in self.rows])
        networks = _told_apart([(_setting(row, "model", "images"), _setting(row, "weights", "content")) for row in self.rows])
        groups: dict[str, list[Row]] = {}
        for title, network, row in zip(titles, networks, self.rows, strict=True):
            groups.setdefault(title, []).append({**row, "network": network})
        return [(title, sorted(rows, key=_order)) for title, rows in groups.items()]

    def _draw(self) -> list[Path]:
        try:
            import matplotlib
        except ImportError:
            return []
        matplotlib.use("agg")
        from cycler import cycler
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        # Dashes distinguish lines once the colours run out.
        styles = cycler(linestyle=["-", "--", ":"]) * matplotlib.rcParams["axes.prop_cycle"]

        files, used = [], set()
        for title, rows in self._groups():
            kind = rows[0]["kind"]
            rows = [row for row in rows if kind in _AXES and (kind == "reconstruction" or "evaluations" in row)]
            if not rows:  # images of a folder and losses have no steps
                continue
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                lines.setdefault(_line(row), []).append(_AXES[kind][2](row))
            figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=110)
            axes = figure.subplots()
            axes.set_prop_cycle(styles)
            for name, points in lines.items():
                axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, linewidth=1.2, label=name)
            ticks = sorted({x for points in lines.values() for x, _ in points if float(x).is_integer()})
            axes.set(xscale="log", yscale="log", xlabel=_AXES[kind][0], ylabel=_AXES[kind][1](rows[0]), title=title)
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.tick_params(axis="y", which="minor", labelsize=7)
            values = [y for points in lines.values() for _, y in points]
            if max(values) < 5 * min(values):  # a logarithmic axis would have only two or three round numbers
                axes.yaxis.set_major_locator(MaxNLocator(8))
                axes.set_yticks([], minor=True)
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3, which="both")
            figure.legend(fontsize=8, loc="outside right upper")
            name = next(n for i in range(1, 100) if (n := f"{kind}-{i}.png" if i > 1 else f"{kind}.png") not in used)
            used.add(name)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            atomic_write(self.folder / name, buffer.getvalue())
            files.append(self.folder / name)
        return files


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and row.get("kind") in _TITLES and isinstance(row.get("settings"), dict)


def _setting(row: Row, *names: str) -> Any:
    """The first of these settings that the row has."""
    return next((row["settings"][name] for name in names if row["settings"].get(name)), None)


def _told_apart(named: list[tuple[str, str | None]]) -> list[str]:
    """The names, with the first digits of the checksums if different things share a name. Rows of older versions have no
    checksum."""
    checksums: dict[str, set[str]] = {}
    for name, checksum in named:
        checksums.setdefault(name, set()).update([checksum] if checksum else [])
    return [
        f"{name} ({checksum.removeprefix('sha256:')[:8]})" if checksum and len(checksums[name]) > 1 else name
        for name, checksum in named
    ]


def _order(row: Row) -> tuple[Any, ...]:
    s = row["settings"]
    return s.get("model") or "", s.get("solver") or "", str(s.get("spacing")), str(s.get("eta")), s.get("steps") or 0


def _line(row: Row) -> str:
    """The settings of a row except its steps, in words."""
    s = row["settings"]
    words = [row["network"]]
    if s.get("tolerance") is not None:
        words.append("tolerance")
    elif s.get("solver"):
        words += [s["solver"], s["spacing"]] + ([f"eta {s['eta']}"] if s["eta"] else [])
    if s.get("guidance") is not None:
        words.append(f"guidance {_guidance(row)}")
    return ", ".join(words)


def _spacing(row: Row) -> str:
    s = row["settings"]
    return f"tolerance {s['tolerance']:g}" if s.get("tolerance") is not None else _text("spacing")(row)


def _guidance(row: Row) -> str:
    interval, guide = (row["settings"].get(name) for name in ("guidance_interval", "guide"))
    limited = "" if interval is None else f" in {interval[0]}-{interval[1]}"
    scales = row["settings"].get("guidance")
    text = ",".join(f"{scale:g}" for scale in scales) if isinstance(scales, list) else _text("guidance")(row)
    return text + limited + ("" if guide is None else f", guide {guide}")


def _text(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row["settings"].get(name)
        return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    return cell


def _number(name: str, digits: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        return "" if row.get(name) is None else format(row[name], digits)

    return cell


def _with_error(name: str, digits: str, factor: float = 1) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if row.get(name) is None:
            return ""
        error = row.get(f"{name} standard error")
        return format(factor * row[name], digits) + ("" if error is None else f" ± {format(factor * error, digits)}")

    return cell


def _unusual(row: Row) -> str:
    """The unusual settings of a comparison: a reference of other sizes or colours, or another feature network."""
    pictures, features = row.get("reference pictures"), row["settings"].get("features", NAME)
    return (f", {pictures}" if pictures else "") + (f", features of {features}" if features != NAME else "")


def _by_timestep(row: Row) -> str:
    means = row.get("loss by timestep", {}).items()
    return ", ".join(f"{timesteps}: {mean:.3g}" for timesteps, mean in means if mean is not None)


_NETWORK = {"network": lambda row: row["network"]}
_SAMPLER = {
    "solver": _text("solver"),
    "spacing": _spacing,
    "eta": _text("eta"),
    "evaluations": _number("evaluations", ".4g"),
}
_COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "quality": {
        **_NETWORK,
        **_SAMPLER,
        "guidance": _guidance,
        "precision of numbers": _text("dtype"),
        "FID": lambda row: f"{row[row['label']]:.2f}",
        "KID x 1000": _with_error("KID", ".2f", 1000),
        "precision": _number("precision", ".3f"),
        "recall": _number("recall", ".3f"),
        "images": _number("images", ","),
        "seeds": _text("seeds"),
        "run": _number("run", "d"),
    },
    "trajectory": {
        **_NETWORK,
        **_SAMPLER,
        "error": _with_error("error", ".5f"),
        "whitened error": _with_error("whitened error", ".5f"),
        "images": _number("images", ","),
        "seeds": _text("seeds"),
        "run": _number("run", "d"),
    },
    "reconstruction": {
        **_NETWORK,
        "spacing": _text("spacing"),
        "S": _text("steps"),
        "error": _with_error("error", ".5f"),
        "images": _number("images", ","),
        "run": _number("run", "d"),
    },
    "loss": {
        **_NETWORK,
        "loss": _with_error("loss", ".4f"),
        "by timestep": _by_timestep,
        "images": _number("images", ","),
        "run": _number("run", "d"),
    },
}
_TITLES: dict[str, Callable[[Row], str]] = {
    "quality": lambda row: f"{row['label']} against {row['settings']['reference']} ({row['reference images']}){_unusual(row)}",
    "trajectory": lambda row: (
        f"Distance to the solution in {row['solution steps']} steps "
        "(root mean square, images in [-1, 1]; whitened: with all frequencies counted alike)"
    ),
    "reconstruction": lambda row: f"Reconstruction of {row['settings']['data']} (squared error a dimension, images in [0, 1])",
    "loss": lambda row: f"Squared error of epsilon on {row['settings']['data']}",
}
_DATA_CONTENTS = ("reference content", "data content")
_AXES: dict[str, tuple[str, Callable[[Row], str], Callable[[Row], tuple[float, float]]]] = {
    "quality": ("network evaluations an image", lambda row: row["label"], lambda row: (row["evaluations"], row[row["label"]])),
    "trajectory": (
        "network evaluations an image",
        lambda row: "error",
        lambda row: (row["evaluations"], row["error"]),
    ),
    "reconstruction": ("steps S, each way", lambda row: "squared error", lambda row: (row["settings"]["steps"], row["error"])),
}
