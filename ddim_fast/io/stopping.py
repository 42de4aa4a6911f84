"""Signals that end a command: what is being made is finished first, and a second signal does not wait for it.

A scheduler warns with SIGTERM or SIGUSR1, a terminal that is closed with SIGHUP, and Ctrl-C is SIGINT. Outside of
:meth:`Signals.finishing` the first one ends the command at once, as Ctrl-C does in Python.

Python runs its handlers of signals between two of its own instructions, and the backward pass of a large network is one that
lasts for tens of seconds. So a thread answers, which the signal itself wakes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["Signals", "Stopped", "signals"]

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_PATIENCE = 2.0  # seconds in which a second signal may end the process in order


class Stopped(KeyboardInterrupt):
    """A signal ends the command.

    Attributes:
        exit_code: what shells call it: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


class Signals:
    """A context in which signals stop a command, where it is entered; :func:`ddim_fast.cli.parser.run_command` does. Signals
    that are ignored, as SIGHUP under nohup, still are.

    Attributes:
        came: the first signal, or None.
    """

    def __init__(self) -> None:
        self.came: int | None = None
        self._what: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self  # they are the main thread's
        self.came, self._what = None, None
        self._answered, self._left = threading.Event(), threading.Event()
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._waker_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._pass_over
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._remember)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            self._left.set()
            self._restore()
            self._waker.close()
            self._thread.join()
            self._woken.close()
        self.came = None

    @contextlib.contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Inside, the first signal is remembered and answered, and :meth:`check` tells of it.

        Args:
            what: is being made, as "step".
        """
        before, self._what = self._what, what
        try:
            yield
        finally:
            if self.came is not None and self._before:
                self._answered.wait(_PATIENCE)  # before anything else is said, and while it is known what is finished
            self._what = before

    def each(self, items: Iterable[T], what: str) -> Iterator[T]:
        """The items, each of which is finished where a signal comes; before the next one, the command ends."""
        for item in items:
            with self.finishing(what):
                yield item
            self.check()

    def abandon(self, make: Callable[[], None]) -> None:
        """Call ``make`` amid :meth:`finishing`; a signal ends it at once, as nothing is lost by that. Not at all where one came
        before."""
        what, self._what = self._what, None
        try:
            if self.came is None:
                make()
        except Stopped:
            pass
        finally:
            self._what = what

    def check(self) -> None:
        """End the command where a signal came.

        Raises:
            Stopped: it did.
        """
        if self.came is not None:
            raise Stopped(self.came)

    def _remember(self, number: int, frame: object) -> None:
        is_first, self.came = self.came is None, self.came or number
        if not is_first or self._what is None:
            self.check()

    def _pass_over(self, unraisable: sys.UnraisableHookArgs) -> None:
        """What Python calls with an exception in a destructor: a signal that came there is for the next :meth:`check`."""
        if unraisable.exc_type is not Stopped:
            self._hook_before(unraisable)

    def _answer(self) -> None:
        came = 0
        while number := self._woken.recv(1):
            if number[0] not in self._before:
                continue
            came += 1
            if came == 1 and self._what is not None and os.environ.get("RANK", "0") == "0":  # torchrun hands it to all
                again = "Ctrl-C" if number[0] == signal.SIGINT else signal.Signals(number[0]).name
                print(f"\nstopping after this {self._what}; {again} again ends at once", file=sys.stderr, flush=True)
            self._answered.set()
            if came > 1 and not self._left.wait(_PATIENCE):
                os._exit(128 + number[0])

    def _restore(self) -> None:
        signal.set_wakeup_fd(self._waker_before)
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


signals = Signals()


def _restore_in_child() -> None:
    """A process that was forked is ended by signals as any other, and does not wake its parent."""
    if signals._before:
        signals._restore()


os.register_at_fork(after_in_child=_restore_in_child)
