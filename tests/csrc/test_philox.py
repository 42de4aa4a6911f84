"""csrc/philox.h: the bits, the numbers of the definition, and those of the GPU, which has fp32 alone."""

import ctypes

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # the emulated module is compiled first

ONES = 0xFFFFFFFF


@pytest.fixture(scope="module")
def library(emulated_library):
    return ctypes.CDLL(str(emulated_library))


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
def test_philox_gives_the_known_answers_of_random123(library, counter, key, expected):
    words = (ctypes.c_uint32 * 4)()
    library.philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), words)
    assert tuple(words) == expected


def normals(library, words: np.ndarray, fast: bool) -> np.ndarray:
    words = np.ascontiguousarray(words, dtype=np.uint32)
    out = np.full(words.shape, np.nan, np.float32)
    address = ctypes.c_void_p
    library.normals(address(words.ctypes.data), ctypes.c_int64(words.size // 4), ctypes.c_bool(fast), address(out.ctypes.data))
    return out


def words_of_every_kind() -> np.ndarray:
    """Radii and angles: random words, and those next to 0, the quadrants' borders and 2^32."""
    rng = np.random.default_rng(0)
    border = (np.arange(5)[:, None] * 2**30 + np.arange(-40, 40)).clip(0, ONES).ravel()
    octants = (np.arange(8)[:, None] * 2**29 + np.arange(-40, 40)).clip(0, ONES).ravel()
    special = np.concatenate([border, octants, 2 ** np.arange(32)])
    words = rng.integers(0, 2**32, (200_000, 4))
    words[: len(special) * 20, 0::2] = rng.choice(special, (len(special) * 20, 2))
    words[len(special) * 10 : len(special) * 30, 1::2] = rng.choice(special, (len(special) * 20, 2))
    return words


def in_longdouble(words: np.ndarray) -> np.ndarray:
    u = (words.astype(np.longdouble) + np.longdouble(0.5)) / 2**32
    radius = np.sqrt(-2 * np.log(u[:, 0::2]))
    # Reduced to an eighth of a turn, where neither function loses digits.
    turns = u[:, 1::2] * 4
    quadrant = np.rint(turns)
    angle = (turns - quadrant) * (np.longdouble(2) * np.arctan(np.longdouble(1)))
    cosine, sine = np.cos(angle), np.sin(angle)
    odd, negative = quadrant % 2 == 1, quadrant % 4 // 2 == 1
    first = np.where(odd, -sine, cosine) * np.where(negative, -1, 1)
    second = np.where(odd, cosine, sine) * np.where(negative, -1, 1)
    return np.stack([radius * first, radius * second], -1).reshape(words.shape)


def test_the_fast_numbers_are_exact_to_a_few_units_in_the_last_place(library):
    words = words_of_every_kind()
    exact, fast = in_longdouble(words), normals(library, words, fast=True)
    relative = np.abs(fast - exact) / np.abs(exact)
    assert np.isfinite(fast).all()
    assert relative.max() < 4e-7 and np.sqrt((relative**2).mean()) < 1e-7


def test_the_exact_numbers_are_rounded_once(library):
    words = words_of_every_kind()
    exact, rounded = in_longdouble(words), normals(library, words, fast=False)
    # Near the zeros of the sine the definition, which takes it of a rounded angle, has a larger relative error.
    assert (np.abs(rounded - exact) <= 2.0**-24 * 1.001 * np.abs(exact) + 1e-14).all()
