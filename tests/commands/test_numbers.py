"""Numbers in the words of a command line."""

import argparse

import pytest

from ddim_fast.cli.parser import list_integers, parse_integers, parse_positive, parse_seed


@pytest.mark.parametrize("text,numbers", [("0-3,8", [0, 1, 2, 3, 8]), ("7", [7]), ("5, 1-2", [5, 1, 2]), ("1-3", [1, 2, 3])])
def test_lists_and_ranges(text, numbers):
    assert parse_integers(text) == numbers
    assert list_integers(numbers) == text.replace(" ", "")


@pytest.mark.parametrize("parse", [parse_integers, parse_positive, parse_seed])
def test_thousands_of_digits_are_a_number_that_is_too_large(parse):
    """Python refuses to read so many, with an error of its own."""
    try:
        assert parse("9" * 5000)[0] > 2**63
    except argparse.ArgumentTypeError as error:
        assert "9999" in str(error)
