"""Locks: one process at a time writes to a folder.

A lock is a file ``.lock`` in the folder, locked by ``flock`` and so free again when its process ends, however it ends. On a
file system without such locks another file is the lock by being there; it names the process that made it, and is void when
that one is gone. :func:`ddim_fast.cli.parser.run_command` releases what a command holds at its end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Held", "hold", "holding", "release", "release_all"]

_NAME, _EXCLUSIVE = ".lock", ".lock-by-name"

# What flock says where a file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)

# Seconds between attempts of who waits, and until a line says so.
_POLL, _SILENCE = 0.05, 2.0


class Held(RuntimeError):
    """Another process holds the lock; the message names it."""


class _Lock:
    """A lock that this process holds.

    Raises:
        Held: another one does.
    """

    def __init__(self, folder: Path, named: str) -> None:
        self._files: list[Path] = []
        self._descriptor: int | None = None
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            self._take(folder, named)
        except BaseException:
            self.release()
            raise

    def _take(self, folder: Path, named: str) -> None:
        path = folder / _NAME
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who held it has just removed the folder
                continue
            except OSError:
                there = next(place for place in (folder, *folder.parents) if place.exists())
                if os.access(there, os.W_OK):
                    raise
                return  # nothing else will be written there either
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Held(_refusal(named, _holder(path))) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                path.unlink(missing_ok=True)
                self._take_by_name(folder / _EXCLUSIVE, named)
                return
            if _is_same(self._descriptor, path):
                break
            os.close(self._descriptor)  # its former holder has removed the file since: there may be a new one
            self._descriptor = None
        self._files.append(path)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, _own_name().encode())

    def _take_by_name(self, path: Path, named: str) -> None:
        while True:
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                holder = _holder(path)
                if not _is_gone(holder, path):
                    remedy = f"; if that process has ended, remove {path}" if _elsewhere(holder) else ""
                    raise Held(_refusal(named, holder) + remedy) from None
                _remove_void(path, holder)
                continue
            self._files.append(path)
            with os.fdopen(descriptor, "w") as file:
                file.write(_own_name())
            return

    def release(self) -> None:
        """Free it, and remove the folders that were made for it where nothing came into them."""
        for file in self._files:
            file.unlink(missing_ok=True)  # while it is locked: see _is_same
        self.forget()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def forget(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None


_held: dict[Path, _Lock] = {}


def hold(folder: Path, named: str, wait: bool = False) -> None:
    """See that no other process writes to ``folder``, which is made where it is not there, until :func:`release`, or until this
    process ends. A folder in which nothing can be written has no lock.

    Args:
        named: what users are told that is locked, such as ``--out samples``.
        wait: until who holds it has released it, instead of raising.

    Raises:
        Held: another process, or this one, writes there.
    """
    told = time.monotonic() + _SILENCE
    while True:
        try:
            _held[folder.resolve()] = _Lock(folder, named)
            return
        except Held as error:
            if not wait:
                raise
            if time.monotonic() > told and sys.stderr.isatty():
                print(f"waiting: {error}", file=sys.stderr, flush=True)
                told = math.inf
        time.sleep(_POLL)


def release(folder: Path) -> None:
    """Let others write to a folder that this process holds."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        lock.release()


def release_all() -> None:
    """Let others write to all folders that this process holds."""
    while _held:
        _held.popitem()[1].release()


@contextlib.contextmanager
def holding(folder: Path, named: str) -> Iterator[None]:
    """Inside, nobody else writes to ``folder``; before, wait until nobody does."""
    hold(folder, named, wait=True)
    try:
        yield
    finally:
        release(folder)


def _forget_all() -> None:
    """A process that was forked holds nothing: its copies of the files would keep the locks after its parent has ended."""
    for lock in _held.values():
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_all)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _own_name() -> str:
    """Number, machine and time of start of this process: what tells it from all others."""
    return f"{os.getpid()} {socket.gethostname()} {_start(os.getpid())}\n"


def _holder(path: Path) -> list[str]:
    """What :func:`_own_name` was for the process that wrote ``path``; [] where it does not write it."""
    for _ in range(100):  # it does so right after it has the lock, if it is given the time
        with contextlib.suppress(OSError):
            words = path.read_text(encoding="utf-8", errors="replace").split()
            if len(words) == 3 and words[0].isdecimal():
                return words
        time.sleep(0.02)
    return []


def _refusal(named: str, holder: list[str]) -> str:
    who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
    return f"{named} is being written by {who}; wait for it or end it, or name another place"


def _elsewhere(holder: list[str]) -> bool:
    return bool(holder) and holder[1] != socket.gethostname()


def _is_gone(holder: list[str], path: Path) -> bool:
    """Whether the process that made a lock by name has ended, as far as this machine can know."""
    if not holder:  # it writes its name right after it makes the file
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > 10
        return True
    if _elsewhere(holder):
        return False
    try:
        os.kill(int(holder[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _start(int(holder[0])) != holder[2]  # another process has its number now


def _start(process: int) -> str:
    """When a process started, in ticks of this machine's clock; "-" where nobody knows, and of one that has ended."""
    try:
        state, *numbers = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "-" if state == "Z" else numbers[18]
    except (OSError, IndexError, ValueError):
        return "-"


def _remove_void(path: Path, holder: list[str]) -> None:
    """Remove the lock of a process that is gone, unless another one has done so and taken the place since."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _holder(aside) != holder:
            os.rename(aside, path)
            return
        aside.unlink()
