"""Are generated digits understood? By classifiers that have never heard the voice:

python benchmarks/audio_recognition.py --data spoken-digits/ --model runs/digits-mel --out recognition.json

Speakers are held out two at a time. A classifier is trained on recordings of the others, and tried on recordings of the two
and on what the model generates in their voices: what is written to WAV files, so Griffin-Lim's phases are a part of it.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from recognition import train_recogniser

from ddim_fast import Sampler, UNet
from ddim_fast.audio.codec import make_codec
from ddim_fast.cli.parser import parse_spacing
from ddim_fast.data.sound_files import load_sounds
from ddim_fast.io.files import atomic_write


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="recordings whose labels are WORD/SPEAKER")
    p.add_argument("--model", required=True)
    p.add_argument("--steps", type=int, default=20, help="of the sampler")
    p.add_argument("--spacing", default="quadratic")
    p.add_argument("--guidance", type=float)
    p.add_argument("--per-class", type=int, default=10, help="generated sounds of each word and speaker")
    p.add_argument("--classifier-steps", type=int, default=600)
    p.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = p.parse_args()

    model = UNet.from_pretrained(arguments.model)
    codec = make_codec(model.audio)
    sounds = load_sounds(arguments.data, model.audio)
    real, real_names = codec.spectrograms(codec.encode(sounds.waves)), sounds.labels

    started = time.perf_counter()
    numbers = torch.arange(len(model.config.class_names)).repeat_interleave(arguments.per_class)
    sampler = Sampler(model, steps=arguments.steps, spacing=parse_spacing(arguments.spacing))
    images = sampler.sample(seeds=range(len(numbers)), labels=numbers, guidance=arguments.guidance)
    waves = codec.decode(images)
    made, made_names = codec.spectrograms(codec.encode(waves)), [model.config.class_names[n] for n in numbers]
    seconds = time.perf_counter() - started

    words, voices = (sorted({name.split("/")[i] for name in real_names}) for i in (0, 1))
    right: dict[str, dict[str, list[bool]]] = {"real": {}, "generated": {}}
    for i in range(0, len(voices), 2):
        held_out = voices[i : i + 2]
        heard = torch.tensor([name.split("/")[1] not in held_out for name in real_names])
        targets = torch.tensor([words.index(name.split("/")[0]) for name in real_names])
        recogniser = train_recogniser(real[heard], targets[heard], steps=arguments.classifier_steps)
        for kind, spectrograms, names in (("real", real, real_names), ("generated", made, made_names)):
            for voice in held_out:
                chosen = [j for j, name in enumerate(names) if name.split("/")[1] == voice]
                with torch.no_grad():
                    found = recogniser(spectrograms[chosen]).argmax(1).tolist()
                right[kind][voice] = [words[f] == names[j].split("/")[0] for f, j in zip(found, chosen, strict=True)]
                print(f"{kind} {voice}: {_rate(right[kind][voice]):.3f}", flush=True)

    figures = {
        "accuracy": {kind: _rate([r for each in by_voice.values() for r in each]) for kind, by_voice in right.items()},
        "by_voice": {kind: {voice: _rate(each) for voice, each in by_voice.items()} for kind, by_voice in right.items()},
        "generated_sounds": len(waves),
        "largest_sample": float(abs(waves).max()),
        "seconds_of_sampling": seconds,
        "steps": arguments.steps,
        "spacing": arguments.spacing,
        "guidance": arguments.guidance,
    }
    atomic_write(arguments.out, (json.dumps(figures, indent=2) + "\n").encode())
    print(json.dumps(figures["accuracy"]))


def _rate(right: list[bool]) -> float:
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
