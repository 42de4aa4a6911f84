import pytest

from ddim_fast.io.progress import duration


@pytest.mark.parametrize(
    "seconds,words",
    [(3.4, "3 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (38_458_800, "445 days")],
)
def test_durations_are_in_words(seconds, words):
    assert duration(seconds) == words
