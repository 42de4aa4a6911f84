import numpy as np
import pytest
import soundfile
import torch

from ddim_fast.audio.codec import make_codec
from ddim_fast.jobs.outputs import Batches
from ddim_fast.jobs.sound_outputs import WavFolder
from tests.helpers.tones import RATE, tone

BATCHES = Batches([3, 1, 12], None, 2, (1, 1, 1))


def fill(folder: WavFolder, images: torch.Tensor) -> None:
    folder.begin({"settings": {}})
    for k in range(2):
        folder.write(k, folder.convert(images[2 * k : 2 * k + 2]))


def test_sounds_are_16_bit_wav_files_of_the_models_rate(tmp_path, config):
    folder = WavFolder(tmp_path / "out", BATCHES, config)
    images = make_codec(config).encode(np.stack([tone(300), tone(600), 3 * tone(900)]))
    fill(folder, images)
    assert folder.missing() == []
    info = soundfile.info(tmp_path / "out" / "000012.wav")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (RATE, 1, config.length, "PCM_16")
    loudest = soundfile.read(tmp_path / "out" / "000012.wav", dtype="int16")[0]
    assert 20000 < abs(loudest).max() <= 32767  # clipped, where it does not fit
    assert folder.preview(2).shape == (2, 1, config.mels, config.frames)
    folder.finish()
    assert folder.record()["finished"]


@pytest.mark.parametrize("damage", ["gone", "cut", "another length", "no sound"])
def test_a_damaged_file_is_missing(tmp_path, config, damage):
    folder = WavFolder(tmp_path / "out", BATCHES, config)
    fill(folder, torch.zeros(3, *config.image_shape))
    file = tmp_path / "out" / "000012.wav"
    if damage == "gone":
        file.unlink()
    elif damage == "another length":
        soundfile.write(file, np.zeros(100), RATE)
    else:
        file.write_bytes(file.read_bytes()[:-10] if damage == "cut" else b"RIFF")
    assert folder.missing() == [1]


def test_remains_of_a_killed_process_are_removed(tmp_path, config):
    folder = WavFolder(tmp_path / "out", BATCHES, config)
    fill(folder, torch.zeros(3, *config.image_shape))
    for name in (".000012.wav.abcdefgh", ".spectrograms.png.abcdefgh", ".mine.wav.abcdefgh"):
        (tmp_path / "out" / name).touch()
    folder.remove_remains()
    assert [p.name for p in (tmp_path / "out").glob(".*")] == [".mine.wav.abcdefgh"]
