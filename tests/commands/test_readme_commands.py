"""The README's commands as they stand there, one after the other in one folder, in reduced size."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()]

# What other tests run, or what needs a network.
LEFT_OUT = ("make ", "pip install ", "python -m ddim_fast.demo", "python -m ddim_fast.evaluate --fetch-inception")

# Values of options in reduced size, and options that are added where a command has them not.
SMALLER = {"--num-images": "3", "--frames": "3", "--seeds": "0-2"}
MOST_STEPS = 5
ADDED = {
    "sample": {"--seeds": "0-2", "--steps": "3"},
    "reconstruct": {"--steps": "3"},
    "interpolate": {"--steps": "3"},
    "restore": {"--steps": "3"},
    "edit": {"--steps": "3"},
    "train": {"--steps": "2", "--batch-size": "2", "--set": "base_channels=32 layers_per_block=1 num_train_timesteps=6"},
    "evaluate": {"--num-images": "3", "--steps": "3"},
    "export": {},
    "export onnx": {"--steps": "3"},
    "doctor": {},
}


def reduced(command: str, options: list[str]) -> list[str]:
    words = list(options)
    for i, word in enumerate(options[:-1]):
        words[i + 1] = SMALLER.get(word, words[i + 1])
        if word == "--steps":
            words[i + 1] = ",".join(sorted({str(min(int(n), MOST_STEPS)) for n in words[i + 1].split(",")}))
    for option, value in ADDED["export onnx" if options[:2] == ["--to", "onnx"] else command].items():
        given = ("--seeds", "--num-images") if option == "--seeds" else (option,)
        if not any(name in words for name in given) and "--help" not in words:
            words += [option, *value.split()]
    return words


@pytest.fixture
def folder(here):
    """What the README takes from its reader."""
    generator = np.random.default_rng(0)

    def picture(name, mode="RGB", size=32):
        (here / name).parent.mkdir(exist_ok=True)
        # Smooth, as photographs are: noise is no image of the model's, and exact inversion would search for long.
        pixels = generator.integers(64, 192, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).convert(mode).save(here / name)

    for i in range(3):
        picture(f"photos/{i}.png")
        picture(f"grey/{i}.png", "L")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(here / "mask.png")
    frames = [Image.new("RGB", (32, 32), (40 * i, 80, 120)) for i in range(2)]
    frames[0].save(here / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return here


@pytest.mark.slow
def test_each_command_works_after_the_ones_before(folder, run_here, tiny_inception):
    left_out, ran = [], []
    for line in LINES:
        words = shlex.split(line, comments=True)
        if line.startswith(LEFT_OUT):
            left_out.append(line)
            continue
        command = words[1] if words[0] == "ddim_fast" else words[2].removeprefix("ddim_fast.")
        options = reduced(command, words[2:] if words[0] == "ddim_fast" else words[3:])
        if "--reference" in options:
            options += ["--inception", "."]
        code, out, err = run_here(importlib.import_module(f"ddim_fast.{command}"), *options)
        assert code == 0, f"{line}\n{err}"
        ran.append((line, out))
    assert len(ran) >= 20 and len(ran) + len(left_out) == len(LINES)
    for name in ("samples/000002.png", "samples/grid.png", "film.gif", "samples.npz", "profile/trace.json", "slow.gif"):
        assert (folder / name).is_file(), name
    for name in ("reconstruction", "between", "restored", "restored-2", "edited", "samples-2", "runs/photos", "evaluation"):
        assert (folder / name).is_dir(), name
