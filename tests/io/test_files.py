import io
import os

import pytest

from ddim_fast.io.files import atomic_folder, check_expansion, one_line, read_json, visible_files


def fill(folder):
    with atomic_folder(folder) as new:
        (new / "a").write_text("1")
        (new / "b").mkdir()
        (new / "b/c").write_text("2")


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("place", ["new", "empty", "link", "."])
def test_a_folder_is_filled_whatever_it_was(place, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if place == "." else tmp_path)
    fill((tmp_path if place != "." else type(tmp_path)()) / place)
    assert contents(tmp_path / ("new" if place == "new" else "empty")) == ["a", "b", "b/c"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("exists", [False, True])
def test_what_goes_wrong_leaves_nothing(exists, tmp_path):
    if exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(tmp_path / "out") as new:
        (new / "a").write_text("1")
        raise RuntimeError("stop")
    assert contents(tmp_path) == ["out"] * exists


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        fill(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_a_pipe_is_no_file(tmp_path):
    (tmp_path / "a").touch()
    os.mkfifo(tmp_path / "b")
    (tmp_path / "c").symlink_to("nowhere")
    assert sorted(path.name for path in visible_files(tmp_path)) == ["a", "c"]  # what reads the broken link says so


def test_a_folder_that_two_links_lead_to_comes_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1").touch()
    (tmp_path / "data").mkdir()
    for name in "ab":
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert list(visible_files(tmp_path / "data")) == [tmp_path / "data/a/1"]


def test_json_of_many_megabytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match=r"config\.json: it has 67,108,865 bytes, and the largest such file has 67,108,864"):
        read_json(tmp_path / "config.json")


def test_what_expands_far_more_than_usual_is_a_bomb_where_it_is_large():
    check_expansion(1, 2**28)
    check_expansion(2**28, 100 * 2**28)
    with pytest.raises(ValueError, match="its 1000 bytes would become 268435457: a decompression bomb"):
        check_expansion(1000, 2**28 + 1)


def test_a_message_is_one_line_and_names_no_place_in_memory():
    error = ValueError(f"cannot read\n  {io.BytesIO()!r}: {object()!r}")
    assert one_line(error) == "cannot read _io.BytesIO: object"
