import math

import numpy as np
import pytest
import torch

from ddim_fast import seeded_noise
from ddim_fast.ops.noise import INITIAL_NOISE, philox4x32, seeded_noise_numpy

ONES = 0xFFFFFFFF


def philox_in_plain_integers(counter, key):
    """Salmon et al. 2011, figure 2, with Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        r0, r1 = (k0 + i * 0x9E3779B9) % 2**32, (k1 + i * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ r0, low1, high0 ^ c3 ^ r1, low0
    return c0, c1, c2, c3


def normals_of(words):
    """Two Box-Muller pairs from four words."""
    u = [(w + 0.5) / 2**32 for w in words]
    out = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = math.sqrt(-2 * math.log(first)), 2 * math.pi * second
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out


@pytest.mark.parametrize(
    "counter,key,expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected == philox_in_plain_integers(counter, key)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 7, INITIAL_NOISE])
def test_the_counter_is_block_and_step_and_the_key_is_the_seed(seed, step):
    key = (seed % 2**32, seed >> 32)
    expected = [z for block in range(3) for z in normals_of(philox_in_plain_integers((block, step, 0, 0), key))]
    actual = seeded_noise([seed], step, (1, 3, 4)).flatten().numpy()
    np.testing.assert_array_max_ulp(actual, np.array(expected, np.float32))


def test_the_numbers_are_standard_normal():
    z = seeded_noise(range(64), 0, (1, 64, 64)).flatten().double()
    n = len(z)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n)
    # Kolmogorov and Smirnov: the largest distance between the distribution functions, at a level of 0.1 %.
    cdf = torch.special.ndtr(z.sort().values)
    distance = max(float((cdf - torch.arange(n) / n).abs().max()), float((cdf - torch.arange(1, n + 1) / n).abs().max()))
    assert distance < 1.95 / math.sqrt(n)
    assert 4 < float(z.abs().max()) < 7


def test_images_steps_and_elements_are_uncorrelated():
    size = (1, 256, 256)
    base = seeded_noise([5], 0, size).flatten()
    for other in (
        seeded_noise([6], 0, size).flatten(),
        seeded_noise([5 + 2**32], 0, size).flatten(),
        seeded_noise([5], 1, size).flatten(),
        seeded_noise([5], INITIAL_NOISE, size).flatten(),
        *(base.roll(shift) for shift in (1, 2, 3, 4, 256)),
    ):
        assert not torch.equal(base, other)
        assert abs(float((base * other).mean())) < 4 / math.sqrt(len(base))


def test_an_image_does_not_depend_on_its_batch():
    together = seeded_noise([9, 2, 2**40, 2], 3, (3, 5, 7))
    for i, seed in enumerate([9, 2, 2**40, 2]):
        assert torch.equal(together[i], seeded_noise([seed], 3, (3, 5, 7))[0])
    assert torch.equal(seeded_noise(torch.tensor([9, 2]), torch.tensor(3), (3, 5, 7)), together[:2])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (3, 5, 7), (1, 3, 3)])
def test_shapes_need_not_be_multiples_of_four(shape):
    noise = seeded_noise([1, 2], 0, shape)
    assert noise.shape == (2, *shape) and noise.dtype == torch.float32
    longer = seeded_noise([1, 2], 0, (1, 1, 4 * math.prod(shape)))
    assert torch.equal(noise.flatten(1), longer.flatten(1)[:, : math.prod(shape)])


def test_no_images_are_no_error():
    assert seeded_noise([], 0, (3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (3, 32, 32)])
@pytest.mark.parametrize("step", [0, 7, INITIAL_NOISE])
def test_numpy_draws_the_same_numbers(shape, step):
    seeds = [0, 9, 2**53 + 1, 2**63 - 1]
    expected = seeded_noise(seeds, step, shape).numpy()
    actual = seeded_noise_numpy(seeds, step, shape)
    assert actual.dtype == np.float32 and actual.shape == expected.shape
    np.testing.assert_array_max_ulp(actual, expected)
