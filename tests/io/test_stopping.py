import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from ddim_fast.io.stopping import Signals, Stopped, signals

# The main thread is in one long call of C, as in a backward pass: no handler that is written in Python can run.
BUSY = """
import ctypes, signal, sys
from ddim_fast.io.stopping import signals

with signals, signals.finishing("step"):
    signal.pthread_sigmask(signal.SIG_BLOCK, {int(sys.argv[1])})  # another thread gets it, and the call is not cut short
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(60)
"""
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGUSR1: "SIGUSR1"}


def test_a_signal_is_answered_while_a_step_is_being_made_and_a_second_one_ends_it():
    processes = {}
    try:
        for number in NAMES:  # together: each takes two seconds to end
            command = [sys.executable, "-c", BUSY, str(int(number))]
            processes[number] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number, process in processes.items():
            assert process.stdout.readline() == "busy\n"
            os.kill(process.pid, number)
            assert process.stderr.readline() == "\n"
            assert process.stderr.readline() == f"stopping after this step; {NAMES[number]} again ends at once\n"
            assert process.poll() is None
            os.kill(process.pid, number)
        assert {number: process.wait(30) for number, process in processes.items()} == {n: 128 + n for n in NAMES}
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def test_what_is_being_made_is_finished_and_nothing_after_it():
    made = []
    with pytest.raises(Stopped) as stop, signals:
        for item in signals.each("abc", "letter"):
            if item == "b":
                signal.raise_signal(signal.SIGTERM)
            made.append(item)
    assert made == ["a", "b"] and stop.value.exit_code == 143


def test_a_signal_at_the_end_of_a_step_is_answered_however_late_the_answer_comes(monkeypatch, capsys):
    answer = Signals._answer

    def late(self):
        self._woken.recv(1, socket.MSG_PEEK)
        time.sleep(0.2)
        answer(self)

    monkeypatch.setattr(Signals, "_answer", late)
    with pytest.raises(Stopped), signals:
        with signals.finishing("step"):
            signal.raise_signal(signal.SIGTERM)
        signals.check()
    assert capsys.readouterr().err == "\nstopping after this step; SIGTERM again ends at once\n"


def test_outside_of_what_is_finished_a_signal_ends_at_once(capsys):
    with pytest.raises(Stopped) as stop, signals:
        with signals.finishing("step"):
            pass
        signal.raise_signal(signal.SIGHUP)
        pytest.fail("it went on")
    assert stop.value.exit_code == 129 and capsys.readouterr().err == ""


def test_a_signal_in_a_destructor_ends_the_command_at_the_next_check(monkeypatch):
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)

    class Archive:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stop, signals:
        Archive()  # Python passes over what a destructor raises
        signals.check()
        pytest.fail("it went on")
    assert stop.value.exit_code == 143 and reported == []
    assert sys.unraisablehook == reported.append


def test_a_second_signal_ends_at_once_what_is_being_made():
    with pytest.raises(Stopped) as stop, signals, signals.finishing("step"):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
        signals.check()
    assert stop.value.exit_code == 143  # of the first


def test_handlers_are_as_before_and_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    others = {number: signal.getsignal(number) for number in NAMES}
    try:
        with signals, signals.finishing("step"):
            signal.raise_signal(signal.SIGHUP)
            assert signals.came is None and signal.getsignal(signal.SIGTERM) != others[signal.SIGTERM]
        assert {number: signal.getsignal(number) for number in NAMES} == others
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_process_is_ended_by_a_signal_and_does_not_wake_its_parent():
    program = """
import os, signal, time
from ddim_fast.io.stopping import signals

with signals, signals.finishing("step"):
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"!")
        time.sleep(60)
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.came)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=50)
    assert (result.stdout, result.stderr) == ("-15 None\n", "")
