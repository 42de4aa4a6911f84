import contextlib
import os
import signal
import subprocess
import sys

import pytest

from ddim_fast.io.progress import duration

# The main thread is in one long call of C, as in a backward pass: no handler that is written in Python can run.
BUSY = """
import ctypes, signal
from ddim_fast.jobs.training import _Interrupt

with _Interrupt():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # another thread gets it, and the call is not cut short
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signals of POSIX")
def test_ctrl_c_is_answered_while_a_step_is_being_made_and_a_second_one_ends_it():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "busy\n"
        os.kill(process.pid, signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping after this step; Ctrl-C again ends at once\n"
        assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@pytest.mark.parametrize(
    "seconds,words",
    [(3.4, "3 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (38_458_800, "445 days")],
)
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words
