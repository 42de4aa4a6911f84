"""Damaged sounds of every format that libsndfile writes."""

import numpy as np
import soundfile

from ddim_fast.data.sound_files import load_sounds
from ddim_fast.models.audio import AudioConfig
from tests.helpers.fuzzing import Fuzzer, main, mutate_bytes

RATE = 8000
CONFIG = AudioConfig(kind="mel", sample_rate=RATE // 2, length=2048, fold=2, n_fft=256, hop=128, mels=16)
SOUND = (0.5 * np.sin(np.arange(4000) / 3)).astype(np.float32)


def write(folder):
    paths = []
    for name, subtype in (
        ("a.wav", "PCM_16"), ("b.wav", "FLOAT"), ("c.wav", "IMA_ADPCM"), ("a.flac", "PCM_16"), ("a.ogg", "VORBIS"),
        ("a.opus", "OPUS"), ("a.mp3", "MPEG_LAYER_III"), ("a.aiff", "PCM_16"), ("a.au", "ULAW"), ("a.caf", "ALAC_16"),
        ("a.w64", "PCM_24"),
    ):  # fmt: skip
        paths.append(folder / name)
        format = "OGG" if name == "a.opus" else None
        soundfile.write(paths[-1], np.stack([SOUND, SOUND], 1) if name == "b.wav" else SOUND, RATE, subtype, format=format)
    return paths


SOUNDS = Fuzzer("sounds", write, lambda path: load_sounds(str(path), CONFIG, convert=True), mutate_bytes)


def test_a_damaged_sound_is_refused_by_name():
    SOUNDS.check(150)


if __name__ == "__main__":
    main(SOUNDS)
