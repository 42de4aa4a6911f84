"""No command is silent for long on a terminal."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image

LONGEST = 5.0  # seconds


@pytest.fixture
def photos(tmp_path):
    for name, shape in (("grey", (32, 32)), ("colour", (32, 32, 3))):
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "sample --num-images 24 --steps 20",
        "reconstruct grey --model fashion-mnist --exact --steps 20",
        "interpolate seed:1 seed:2 --frames 15 --steps 20",
        "restore colour --task colorize --travel 5 3 --steps 20",
        "evaluate --trajectory-error --num-images 2 --steps 5 --model fashion-mnist",
        "train --data colour --preset cifar10-64 --batch-size 8 --steps 3 --device cpu --out run",
        "export --to onnx --out exported",
    ],
)
def test_no_command_is_silent_for_more_than_five_seconds(line, photos, tmp_path):
    command, *options = line.split()
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a bar needs a width
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", f"ddim_fast.{command}", *options], stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment
    )
    os.close(theirs)
    said, last, silences = "", time.monotonic(), []
    while True:
        select.select([ours], [], [])
        try:
            text = os.read(ours, 65536).decode(errors="replace")
        except OSError:  # the end, on Linux
            text = ""
        silences.append((time.monotonic() - last, said[-80:]))
        if not text:
            break
        said, last = said + text, time.monotonic()
    os.close(ours)
    assert process.wait(60) == 0, said
    assert max(silences)[0] < LONGEST, max(silences)
