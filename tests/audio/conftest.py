"""What the tests of sounds share."""

import pytest
import soundfile
from tones import MEL, RATE, WAVEFORM, tone

from ddim_fast.models.audio import AudioConfig


@pytest.fixture(params=[MEL, WAVEFORM], ids=lambda config: config.kind)
def config(request) -> AudioConfig:
    """Of each kind."""
    return request.param


@pytest.fixture
def recordings(tmp_path):
    """A folder of two words by two speakers, three recordings each."""
    folder = tmp_path / "recordings"
    for i, (word, speaker) in enumerate((w, s) for w in ("0", "1") for s in ("ann", "bob")):
        (folder / word / speaker).mkdir(parents=True)
        for take in range(3):
            soundfile.write(folder / word / speaker / f"{take}.wav", tone(200 + 150 * i + 20 * take, 1500), RATE)
    return folder
