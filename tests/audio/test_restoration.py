import numpy as np
import pytest
import torch

from ddim_fast.audio.codec import make_codec
from ddim_fast.audio.restoration import band_limit, gap
from tests.helpers.tones import MEL, RATE, WAVEFORM, tone


def test_a_gap_hides_all_that_it_changes(config):
    codec = make_codec(config)
    wave = np.stack([tone(500)])
    damaged = wave.copy()
    damaged[:, int(0.2 * RATE) : int(0.3 * RATE)] = 0
    operator = gap(config, 0.2, 0.3)
    before, after = codec.encode(wave), codec.encode(damaged)
    assert not torch.equal(before, after)
    torch.testing.assert_close(operator(before), operator(after), rtol=0, atol=1e-6)
    hidden = 1 - operator.known.mean()
    assert hidden == pytest.approx(0.1 * RATE / 2048, abs=1e-3) if config is WAVEFORM else 0.2 < hidden < 0.4


def test_a_band_limit_hides_what_lies_above():
    codec, operator = make_codec(MEL), band_limit(MEL, 1000)
    low, both = codec.encode(np.stack([tone(300), tone(300) + tone(1700)]))[:, None]
    assert not torch.equal(low, both)
    torch.testing.assert_close(operator(low), operator(both), atol=0.02, rtol=0)
    assert 0 < operator.known.mean() < 1


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (0.3, 0.2, "a gap has a start and a later end"),
        (-0.1, 0.2, "a gap has a start and a later end"),
        (0.1, 0.6, "from 0 to 0.512 s"),
        (0.0, 0.512, "nothing to restore from"),
        (float("nan"), 0.2, "a gap has a start and a later end"),
    ],
)
def test_impossible_gaps(config, start, end, message):
    with pytest.raises(ValueError, match=message):
        gap(config, start, end)


@pytest.mark.parametrize(("cutoff", "message"), [(10, "nothing to restore from"), (2000, "nothing to restore")])
def test_impossible_cutoffs(cutoff, message):
    with pytest.raises(ValueError, match=message):
        band_limit(MEL, cutoff)
    with pytest.raises(ValueError, match="needs a model of spectrograms"):
        band_limit(WAVEFORM, 1000)
