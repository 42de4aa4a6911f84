"""What the tests of sounds share."""

import pytest
from tones import MEL, WAVEFORM

from ddim_fast.models.audio import AudioConfig


@pytest.fixture(params=[MEL, WAVEFORM], ids=lambda config: config.kind)
def config(request) -> AudioConfig:
    """Of each kind."""
    return request.param
