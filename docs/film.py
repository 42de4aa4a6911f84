"""Films the first commands in a terminal, from a real run: python docs/film.py docs/first-minute.gif

It needs matplotlib, for its monospaced font, and runs the commands of COMMANDS in an empty folder.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

COMMANDS = ("python -m ddim_fast.sample --compile --steps 20", "ls samples | head -3")
PICTURE = "samples/grid.png"

COLUMNS, ROWS, FONT_SIZE = 100, 18, 15
BACKGROUND, TEXT, PROMPT = (24, 26, 31), (214, 217, 224), (120, 200, 130)

# Seconds: between frames, a long wait in the film, and the last frame, which shows the picture.
FRAME, LONGEST, LAST = 0.25, 1.0, 5.0


def record(command: str) -> list[tuple[float, str]]:
    """What a command writes to a terminal, and when."""
    first, second = pty.openpty()
    fcntl.ioctl(second, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    process = subprocess.Popen(command, shell=True, stdin=second, stdout=second, stderr=second, env=environment)
    os.close(second)
    written, started = [], time.monotonic()
    while True:
        try:
            data = os.read(first, 65536)
        except OSError:  # the end, on Linux
            break
        if not data:
            break
        written.append((time.monotonic() - started, data.decode(errors="replace")))
    if process.wait():
        sys.exit(f"{command} failed: {''.join(text for _, text in written)}")
    return written


class Screen:
    """The lines of a terminal that knows carriage returns."""

    def __init__(self) -> None:
        self.lines, self.column = [""], 0

    def write(self, text: str) -> None:
        for part in re.split(r"([\r\n])", text.replace("\r\n", "\n")):
            if part == "\n":
                self.lines.append("")
            if part in ("\n", "\r"):
                self.column = 0
                continue
            line, end = self.lines[-1], self.column + len(part)
            self.lines[-1], self.column = line[: self.column] + part + line[end:], end

    def frame(self, font: ImageFont.FreeTypeFont) -> Image.Image:
        wrapped = [line[i : i + COLUMNS] for line in self.lines for i in range(0, max(1, len(line.rstrip())), COLUMNS)]
        width, height = int(font.getlength("m") * COLUMNS) + 20, ROWS * (FONT_SIZE + 5) + 20
        image = Image.new("RGB", (width, height), BACKGROUND)
        draw = ImageDraw.Draw(image)
        for i, line in enumerate(wrapped[-ROWS:]):
            draw.text((10, 10 + i * (FONT_SIZE + 5)), line, PROMPT if line.startswith("$") else TEXT, font)
        return image


def main(out: Path) -> None:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf", FONT_SIZE)
    screen, frames, durations = Screen(), [], []

    def show(seconds: float) -> None:
        frames.append(screen.frame(font))
        durations.append(seconds)

    for command in COMMANDS:
        screen.write(f"$ {command}\n")
        show(LONGEST)
        before = shown = 0.0
        for when, text in record(command):
            screen.write(text)
            if when - shown >= FRAME:
                show(min(when - before, LONGEST))
                before = shown = when
        show(LONGEST)
    last, picture = frames[-1].copy(), Image.open(PICTURE).convert("RGB")
    picture.thumbnail((last.width - 40, last.height - 40))
    last.paste(picture, ((last.width - picture.width) // 2, (last.height - picture.height) // 2))
    frames.append(last)
    durations.append(LAST)
    small = [frame.quantize(16, dither=Image.Dither.NONE) for frame in frames[:-1]] + [last.quantize(256)]
    milliseconds = [int(1000 * seconds) for seconds in durations]
    small[0].save(out, save_all=True, append_images=small[1:], duration=milliseconds, loop=0, optimize=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(target)
