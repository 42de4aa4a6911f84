import time

import pytest

from ddim_fast.cli import notice


@pytest.mark.parametrize("patience,quiet,said", [(0.01, False, "reading photos\n"), (0.01, True, ""), (60, False, "")])
def test_only_what_takes_long_is_named(patience, quiet, said, monkeypatch, capsys):
    monkeypatch.setattr(notice, "_PATIENCE", patience)
    with notice.notice("reading photos", quiet):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", said)
