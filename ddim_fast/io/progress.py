"""The progress of long computations, by network evaluation.

A sampler reports each network evaluation by :func:`tell`; a watcher in the same thread receives it.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Bar", "collect", "count_of", "duration", "redrawn", "tell", "watch"]

# Called with the arguments of tell.
Watcher = Callable[[float, int], None]

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def tell(images: float, evaluations: int = 1) -> None:
    """The network was called.

    Args:
        images: the finished images, in parts: the steps of one image add up to 1.
        evaluations: the number of calls, each for a batch.
    """
    watcher = _watcher.get()
    if watcher is not None:
        watcher(images, evaluations)


@contextlib.contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Inside, ``watcher`` is called with the arguments of each :func:`tell` of this thread."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextlib.contextmanager
def collect() -> Iterator[list[tuple[float, int]]]:
    """Inside, reports are kept in the list and no watcher is called: the computation is only recorded, to run later."""
    told: list[tuple[float, int]] = []
    with watch(lambda images, evaluations: told.append((images, evaluations))):
        yield told


def count_of(count: int, noun: str) -> str:
    """A count with its noun, given in the plural: "1 image", "2 images"."""
    return f"{count} {noun if count != 1 else noun.removesuffix('s')}"


@contextlib.contextmanager
def redrawn(bar: Any) -> Iterator[None]:
    """Inside, network evaluations redraw ``bar``, one of tqdm, once a second at most, so that its clock goes on."""
    drawn = time.monotonic()

    def redraw(images: float, evaluations: int) -> None:
        nonlocal drawn
        if time.monotonic() - drawn > 1:
            drawn = time.monotonic()
            bar.refresh()

    with watch(redraw):
        yield


def duration(seconds: float) -> str:
    """A duration in its two largest units: 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(minutes / 60 / 24)} days"


class Bar:
    """A progress bar, as a context: inside, each network evaluation moves it.

    Args:
        total: the number of images.
        noun: their name, in the plural.
        there: the number of images already finished.
        runs: sampling runs per image: 2 where images are encoded and decoded.
        shown: whether to show the bar.
        text: the label of a bar that disappears at the end; None is a bar that stays.
    """

    def __init__(
        self,
        total: int,
        noun: str = "images",
        *,
        there: int = 0,
        runs: int = 1,
        shown: bool = True,
        text: str | None = None,
    ) -> None:
        self._total, self._noun, self._made, self._runs, self._shown = total, noun, float(there), runs, shown
        self._text, self._part, self._evaluations = text, 0.0, 0

    def __enter__(self) -> Self:
        from tqdm import tqdm  # not above: most of the package does not need it

        of_all = count_of(self._total, self._noun)
        self._stack = contextlib.ExitStack()
        self._bar = self._stack.enter_context(
            tqdm(
                total=self._total,
                initial=int(self._made),
                desc=self._text,
                leave=self._text is None,
                # A part of an image is not shown, but the remaining time follows from it.
                bar_format=f"{{l_bar}}{{bar}}| {{n:.0f}}/{of_all} [{{elapsed}}<{{remaining}}{{postfix}}]",
                miniters=0,
                smoothing=0,
                disable=not self._shown,
                file=sys.stderr,
            )
        )
        if self._shown:
            self._stack.enter_context(watch(self._tell))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def made(self, images: int) -> None:
        """Set the number of finished images, whatever was reported."""
        self._made, self._part = images, 0.0
        self._show()

    def of(self, done: int, total: int) -> None:
        """Set the finished number and the total."""
        self._total = self._bar.total = total
        self.made(done)

    def _tell(self, images: float, evaluations: int) -> None:
        self._part += images / self._runs
        self._evaluations += evaluations
        self._show()

    def _show(self) -> None:
        if self._evaluations:
            self._bar.set_postfix_str(count_of(self._evaluations, "network calls"), refresh=False)
        self._bar.update(round(min(self._made + self._part, self._total), 6) - self._bar.n)
