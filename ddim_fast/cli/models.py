"""The packaged models: ``ddim_fast models``."""

from __future__ import annotations

import math
import re
from pathlib import Path

from ..io.files import read_json
from ..models.audio import AudioConfig
from ..models.checkpoint import DEFAULT_MODEL, local_model, packaged_models
from ..models.config import UNetConfig
from .parser import CommandParser, run_command

_EXAMPLES = """\
  ddim_fast models
  ddim_fast sample --model fashion-mnist
"""

# Names of more classes do not fit a line.
_NAMED = 12


def main() -> None:
    CommandParser("models", "List the packaged models, which --model takes by name.", _EXAMPLES).parse_args()
    for name in packaged_models():
        usual = " (the default of --model)" if name == DEFAULT_MODEL else ""
        print(f"{name}{usual}")
        for title, text in _facts(local_model(name)):
            print(f"  {title:9}  {text}")
    print("--model also takes a checkpoint folder, one of diffusers too, or owner/name on the Hugging Face Hub.")


def _facts(folder: Path) -> list[tuple[str, str]]:
    """The description of a model, by title."""
    from safetensors import safe_open

    config = UNetConfig.from_dict(read_json(folder / "config.json"))
    with safe_open(folder / "model.safetensors", framework="numpy") as weights:
        names = weights.keys()
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    facts = [("makes", _images(config, folder)), ("size", f"{parameters / 1e6:.1f}M parameters, {megabytes:.0f} MB")]
    classes = config.class_names or ()
    if config.num_classes is not None:
        listed = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
        facts.append(("classes", f"{config.num_classes}: {listed}"))
    if config.guidance is not None:
        facts.append(("guidance", f"{config.guidance:g} looks best"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    if licence := re.search(r"^\| licence \| (.*) \|$", card, re.MULTILINE):
        facts.append(("licence", licence[1]))
    facts.append(("card", str(folder / "README.md")))
    if (folder / "samples.png").is_file():
        facts.append(("picture", str(folder / "samples.png")))
    return facts


def _images(config: UNetConfig, folder: Path) -> str:
    if (folder / "audio.json").is_file():
        sound = AudioConfig.from_dict(read_json(folder / "audio.json"))
        return f"sounds of {sound.length / sound.sample_rate:.1f} s at {sound.sample_rate} Hz"
    height, width = config.size
    return f"images of {width}x{height} in {'grey' if config.in_channels == 1 else 'colour'}"


if __name__ == "__main__":
    run_command(main)
