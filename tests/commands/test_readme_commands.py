"""The commands of README.md and docs/getting-started.md as they stand there, one after the other in one folder, in reduced
size."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/getting-started.md")
LINES = [
    line
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]

# What other tests run, or what needs a network.
LEFT_OUT = ("python3 -m venv ", "pip install ", "torchrun ", "python -m ddim_fast.evaluate --fetch-inception")

# A data set of the Hugging Face Hub, and what stands for it.
ON_THE_HUB, HERE = "uoft-cs/cifar10", "pictures"

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
    words = [HERE if word == ON_THE_HUB else word for word in options]
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
    """What the pages take from their reader: a clone, and a data set of two classes."""
    shutil.copytree(ROOT / "examples" / "photos", here / "examples" / "photos")
    for i in range(4):
        picture = here / HERE / f"{i % 2}" / f"{i}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * i, 80, 120)).save(picture)
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
    assert len(ran) >= 14 and len(ran) + len(left_out) == len(LINES)
    for name in ("samples/000002.png", "samples/grid.png", "film.gif", "samples.npz", "profile/trace.json", "restored/cat.png"):
        assert (folder / name).is_file(), name
    for name in ("horses", "runs/cifar10", "evaluation", "cifar10-onnx", "cifar10-diffusers", "samples-2"):
        assert (folder / name).is_dir(), name
