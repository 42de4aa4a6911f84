"""Work in the background, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

__all__ = ["Background"]


class Background:
    """A context with one thread, which works while the caller goes on. At most one piece of work is begun: the next one waits
    for it. The context is left when all is done, after an error or an interrupt, too.

    An error of the work is raised, once, by the next call of any method, or at the end of the context."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._begun: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._thread.shutdown()
        except KeyboardInterrupt:  # what is written must be whole before others may write there
            self.__exit__()
            raise
        self.finish()

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work`` when what was begun before is done."""
        self.finish()
        self._begun = self._thread.submit(work)

    def check(self) -> None:
        """Raise the error of work that has failed; waits for nothing."""
        if self._begun is not None and self._begun.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the work that was begun."""
        if self._begun is not None:
            wait([self._begun])  # a signal may end the waiting; the work is then still begun
            begun, self._begun = self._begun, None
            begun.result()
