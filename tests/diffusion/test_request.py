import pytest
from numpy.testing import assert_array_equal

from ddim_fast import UNetConfig
from ddim_fast.diffusion.request import Request


@pytest.fixture
def request_of_five():
    config = UNetConfig(sample_size=8, channel_multipliers=(1,), num_classes=4)
    return Request.check(config, stochastic=False, seeds=[5, 6, 7, 8, 9], labels=[0, 1, 2, 3, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_padding_repeats_the_last_image_and_is_not_counted(request_of_five, size):
    plain = list(request_of_five.batches(size))
    padded = list(request_of_five.batches(size, padded=True))
    assert [count for _, count in plain] == [count for _, count in padded] == [len(batch) for batch, _ in plain]
    assert sum(count for _, count in plain) == 5
    for (batch, count), (whole, _) in zip(plain, padded, strict=True):
        assert len(whole) == min(size, 5)
        for name in ("seeds", "labels"):
            before, after = getattr(batch, name), getattr(whole, name)
            assert_array_equal(after[:count], before)
            assert (after[count:] == before[-1]).all()
