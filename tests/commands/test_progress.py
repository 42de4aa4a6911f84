import sys
import time

import pytest

from ddim_fast.cli import progress


@pytest.mark.parametrize(
    "patience,quiet,terminal,said",
    [(0.01, False, True, "reading photos\n"), (0.01, True, True, ""), (60, False, True, ""), (0.01, False, False, "")],
)
def test_only_what_takes_long_is_named_to_who_waits(patience, quiet, terminal, said, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress.notice("reading photos", quiet):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", said)
