"""Do restyled recordings have the new word and voice, and the old loudness?

python benchmarks/audio_restyle.py --data spoken-digits/ --model runs/digits-mel --out restyle.json

Recordings are encoded under their own class and decoded under one whose word and speaker are both others, by strength of the
guidance towards their loudness. Words and voices are told by classifiers of the recordings.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from recognition import train_recogniser

from ddim_fast import Sampler, UNet
from ddim_fast.audio.codec import make_codec
from ddim_fast.audio.control import restyle
from ddim_fast.data.sound_files import load_sounds
from ddim_fast.io.files import atomic_write


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="recordings whose labels are WORD/SPEAKER")
    p.add_argument("--model", required=True)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--guidance", type=float, default=3.0)
    p.add_argument("--stds", type=float, nargs="+", default=[math.inf, 16.0, 8.0], help="in decibels; inf is no guidance")
    p.add_argument("--sounds", type=int, default=60)
    p.add_argument("--classifier-steps", type=int, default=600)
    p.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = p.parse_args()

    model = UNet.from_pretrained(arguments.model)
    codec, names = make_codec(model.audio), model.config.class_names
    sounds = load_sounds(arguments.data, model.audio)
    images = codec.encode(sounds.waves)
    parts = [sorted({name.split("/")[i] for name in names}) for i in (0, 1)]

    def numbers(labels: list[str], i: int) -> torch.Tensor:
        return torch.tensor([parts[i].index(label.split("/")[i]) for label in labels])

    recognisers = [
        train_recogniser(codec.spectrograms(images), numbers(sounds.labels, i), steps=arguments.classifier_steps)
        for i in (0, 1)
    ]
    chosen = torch.randperm(len(sounds), generator=torch.Generator().manual_seed(0))[: arguments.sounds]
    sources = [sounds.labels[i] for i in chosen]
    # The next word and the next speaker, in the order of their names.
    targets = [
        "/".join(part[(part.index(old) + 1) % len(part)] for part, old in zip(parts, s.split("/"), strict=True))
        for s in sources
    ]
    source, target = (torch.tensor([names.index(label) for label in labels]) for labels in (sources, targets))
    curve, sampler = codec.loudness(images[chosen]), Sampler(model, steps=arguments.steps)

    figures = {"steps": arguments.steps, "guidance": arguments.guidance, "sounds": len(chosen), "by_std": {}}
    for std in arguments.stds:
        held = {} if math.isinf(std) else {"curve": curve, "std": std}
        made = restyle(sampler, codec, images[chosen], source=source, target=target, guidance=arguments.guidance, **held)
        heard = codec.encode(codec.decode(made))
        with torch.no_grad():
            found = [recogniser(codec.spectrograms(heard)).argmax(1) for recogniser in recognisers]
        rates = {
            f"{whose}_{what}": float((found[i] == numbers(labels, i)).float().mean())
            for whose, labels in (("new", targets), ("old", sources))
            for i, what in enumerate(("word", "voice"))
        }
        loud = curve > curve.max() - 40
        figures["by_std"][std] = {**rates, "loudness_error": float((codec.loudness(heard) - curve)[loud].abs().mean())}
        print(std, figures["by_std"][std], flush=True)
    atomic_write(arguments.out, (json.dumps(figures, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
