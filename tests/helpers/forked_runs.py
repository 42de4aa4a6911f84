"""Runs of a command that are cut short: processes are forked from one that has loaded everything, so that each takes no time.

The environment has OMP_NUM_THREADS=1: a process that has started other threads must not be forked. Torch has some that wait, of
which Python 3.12 warns.
"""

import os
import subprocess
import sys

_COMMON = """
import importlib, os, signal, sys
from ddim_fast.cli.parser import run_command

name, out, *options = sys.argv[1:]
command = importlib.import_module(name)

codes = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # of the runs, stderr alone counts

def run(number):
    sys.argv = [name, *options, "--quiet", "--out", out.replace("#", str(number))]
    try:
        run_command(command.main)
    except SystemExit as stop:
        return stop.code

def run_and_end(number):
    os._exit(run(number))  # without taking the interpreter down, which takes longer than the run

run(0)  # what is imported at first use is imported once
"""

# For each of the moments at which a file comes to its place, a run that gets the signal just before it; until one gets through.
_CUT = """
replace, moment, status = os.replace, 0, None
while status != 0:
    moment += 1
    child = os.fork()
    if child == 0:
        to_come = moment
        def replace_or_stop(*places):
            global to_come
            to_come -= 1
            if to_come == 0:
                os.kill(os.getpid(), NUMBER)
            replace(*places)
        os.replace = replace_or_stop
        run_and_end(moment)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, file=codes, flush=True)
"""

# Pairs of runs on one output, which begin at once.
_PAIRS = """
for pair in range(1, 1 + NUMBER):
    go, start = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(go, 1)  # until the parent closes it
            run_and_end(pair)
        children.append(child)
    os.close(go), os.close(start)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), file=codes, flush=True)
"""


def cut_short(command: str, number: int, out: object, options: list[object]) -> tuple[list[int], str]:
    """The exit codes of the runs, of those that are killed minus the signal, and what they said on stderr. Run k from 1 got the
    signal before its file k; run 0 is a whole one.

    Args:
        out: with # for the number of the run.
    """
    codes, told = _run(_CUT, command, number, out, options)
    return [int(code) for code in codes], told


def pairs(command: str, count: int, out: object, options: list[object]) -> tuple[list[tuple[int, ...]], str]:
    """The same of pairs, 1 to ``count``, whose runs write to one place at the same time."""
    codes, told = _run(_PAIRS, command, count, out, options)
    return [tuple(map(int, line.split())) for line in codes], told


def _run(program: str, command: str, number: int, out: object, options: list[object]) -> tuple[list[str], str]:
    program = _COMMON + program.replace("NUMBER", str(int(number)))
    words = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, f"ddim_fast.{command}", out, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=280, env=environment)
    return result.stdout.splitlines(), result.stderr
