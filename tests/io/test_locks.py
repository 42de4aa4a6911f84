import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from ddim_fast.io.locks import Held, hold, holding, release, release_all

# Takes the lock of a folder and keeps it until somebody writes a line, or until it is killed.
HOLDER = """
import sys
from pathlib import Path
from ddim_fast.io import locks

if sys.argv[2] == "by name":
    def flock(*_): raise OSError(38, "no locks here")
    locks.fcntl.flock = flock
locks.hold(Path(sys.argv[1]), "it")
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture(params=["flock", "by name"])
def kind(request, monkeypatch):
    """Where the file system has locks, and where it has none."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    if request.param == "by name":
        monkeypatch.setattr(fcntl, "flock", flock)
    yield request.param
    release_all()


@pytest.fixture
def holder(kind, tmp_path):
    """Another process, which holds the lock."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "job", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_another_process_is_refused_and_told_who_holds_it(holder, tmp_path):
    before = sorted((tmp_path / "job").iterdir())
    with pytest.raises(Held, match=f"^--out job is being written by process {holder.pid} on {socket.gethostname()}; wait for"):
        hold(tmp_path / "job", "--out job")
    assert sorted((tmp_path / "job").iterdir()) == before
    holder.kill()
    holder.wait()
    hold(tmp_path / "job", "--out job")
    release(tmp_path / "job")
    assert [path.name for path in (tmp_path / "job").iterdir()] == []


def test_who_waits_gets_the_lock_of_a_process_that_dies(holder, tmp_path):
    waiting = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with holding(tmp_path / "job", "it"):
        assert holder.wait(10) == -signal.SIGKILL
    waiting.wait()


def test_a_lock_is_this_process_alone(kind, tmp_path):
    hold(tmp_path, "it")
    with pytest.raises(Held, match=rf"^it is being written by process {os.getpid()} on "):
        hold(tmp_path, "it")


def test_what_was_made_for_the_lock_goes_with_it(kind, tmp_path):
    hold(tmp_path / "a" / "b", "it")
    release(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    hold(tmp_path / "a" / "b", "it")
    (tmp_path / "a" / "result").touch()
    release_all()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_the_folder_may_go_while_it_is_locked(kind, tmp_path):
    folder = tmp_path / "a"
    hold(folder, "it")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    release(folder)
    hold(folder, "it")


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path):
    program = """
import os, sys, time
from pathlib import Path
from ddim_fast.io import locks

locks.hold(Path(sys.argv[1]), "it")
child = os.fork()
if child == 0:
    os.closerange(1, 3)
    time.sleep(60)
print(child, flush=True)
os._exit(0)
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=50)
    try:
        hold(tmp_path, "it")
    finally:
        os.kill(int(result.stdout), signal.SIGKILL)
        release_all()


@pytest.mark.parametrize(
    "content,is_void",
    [
        ("{gone} {host} 1\n", True),
        ("{this} {host} 1\n", True),  # its number is another process's now
        ("{gone} elsewhere 1\n", False),
        ("", False),  # it has only just been made
    ],
)
def test_a_lock_by_name_is_void_when_its_process_is_gone(content, is_void, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    lock = tmp_path / ".lock-by-name"
    lock.write_text(content.format(gone=gone, this=os.getpid(), host=socket.gethostname()))
    try:
        if is_void:
            hold(tmp_path, "it")
            assert lock.read_text().split()[:2] == [str(os.getpid()), socket.gethostname()]
        else:
            remedy = f"on elsewhere.*; if that process has ended, remove {lock}$" if content else "another process"
            with pytest.raises(Held, match=remedy):
                hold(tmp_path, "it")
    finally:
        release_all()
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_void else [lock.name])


def test_where_nothing_can_be_written_there_is_nothing_to_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    hold(tmp_path, "it")
    hold(tmp_path, "it")
    release_all()
