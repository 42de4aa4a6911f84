"""Convert a model for another program: ``python -m ddim_fast.export --to diffusers --model MODEL --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .cli import MODEL_HELP, CommandParser, run_command
from .interop.diffusers_weights import fold_class, save_diffusers
from .models.checkpoint import DEFAULT_MODEL, resolve_model
from .models.unet import UNet

_EXAMPLES = """\
  python -m ddim_fast.export --to diffusers --model runs/photos --out photos-diffusers
  python -m ddim_fast.export --to diffusers --model ckpt.pth --out cifar10-diffusers
  python -m ddim_fast.export --to diffusers --class 9 --out boots-diffusers
"""


def _parser() -> CommandParser:
    p = CommandParser("export", "Convert a model for another program.", _EXAMPLES)
    p.add_argument("--to", choices=["diffusers"], required=True, help="diffusers: a folder of a DDIMPipeline")
    p.add_argument("--model", metavar="MODEL", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--class", dest="label", metavar="N", type=_label, help=_CLASS_HELP)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write, new or empty")
    return p


_CLASS_HELP = "of a class-conditional model, one class alone, or 'none' for its samples without a label (default: all)"


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    with parser.usage_errors():
        path = resolve_model(arguments.model)
    model = UNet.from_pretrained(path)
    config, state = model.config, model.state_dict()
    if arguments.label is not None:
        with parser.usage_errors():
            config, state = fold_class(config, state, None if arguments.label == "none" else arguments.label)
    try:
        save_diffusers(arguments.out, config, state)
    except FileExistsError as error:
        parser.error(f"--out: {error}")
    print(f"wrote {arguments.out}; load it with diffusers.DDIMPipeline.from_pretrained({str(arguments.out)!r})")
    if config.num_classes is not None:
        print(
            f"Its network takes class_labels 0..{config.num_classes - 1}, and {config.num_classes} for no label. "
            "A DDIMPipeline gives it none: to sample with one, export with --class."
        )


def _label(text: str) -> int | str:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a class number nor 'none'")
    return text if text == "none" else int(text)


if __name__ == "__main__":
    run_command(main)
