import json
import os
import re
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from ddim_fast.io.records import RECORD
from ddim_fast.jobs.outputs import Batches, NpzFile, PngFolder

SETTINGS = {"steps": 20, "guidance": None}
JOB = {"command": "sample", "settings": SETTINGS}


def job(**settings):
    return {**JOB, "settings": settings}


def batches(count=5, size=2, channels=3, labels=None) -> Batches:
    return Batches(range(count), labels, size, (4, 6, channels))


def pictures(of: Batches) -> np.ndarray:
    """Different in every pixel."""
    shape = (len(of.seeds), *of.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fill(output, ks=None) -> np.ndarray:
    output.begin(JOB)
    images, size = pictures(output.batches), output.batches.size
    for k in range(len(output.batches)) if ks is None else ks:
        output.write(k, images[k * size : (k + 1) * size])
    return images


@pytest.fixture(params=[PngFolder, NpzFile])
def output(request, tmp_path):
    return request.param(tmp_path / ("images" if request.param is PngFolder else "images.npz"), batches())


def test_batches_are_slices_of_the_seeds():
    b = Batches([7, 3, 9, 11, 2], [0, 1, 2, 3, 4], 2, (4, 4, 1))
    assert [b[k] for k in range(len(b))] == [([7, 3], [0, 1]), ([9, 11], [2, 3]), ([2], [4])]
    assert b.count([0, 2]) == 3 and b.count([]) == 0
    assert Batches(range(4), None, 2, (4, 4, 1))[1] == (range(2, 4), None)


def test_what_is_written_is_there_and_the_rest_is_missing(output):
    assert output.record() is None
    images = fill(output, [2, 0])
    assert output.missing() == [1]
    assert output.record() == {**JOB, "finished": False}
    np.testing.assert_array_equal(output.read(0), images[:2])
    np.testing.assert_array_equal(output.read(2), images[4:])
    output.write(1, images[2:4])
    output.finish()
    assert output.missing() == [] and output.record() == {**JOB, "finished": True}


@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "other bytes"])
def test_a_damaged_file_is_missing(output, damage):
    fill(output)
    file = output.files(1)[-1]
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": whole[:-1], "other bytes": bytes(len(whole))}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    assert output.missing() == [1]


@pytest.mark.parametrize("stored", [np.zeros((3, 4, 6, 3), np.uint8), np.zeros((2, 4, 6, 3), np.int8)])
def test_a_batch_of_another_form_is_missing(tmp_path, stored):
    output = NpzFile(tmp_path / "a.npz", batches())
    fill(output)
    np.save(output.files(1)[0], stored)
    assert output.missing() == [1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, [3, 1, 4, 1, 5]])
def test_the_npz_file_is_what_numpy_would_write(tmp_path, channels, labels):
    output = NpzFile(tmp_path / "a.npz", batches(channels=channels, labels=labels))
    images = fill(output)
    output.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with np.load(tmp_path / "a.npz") as ours:
        assert ours.files == ["arr_0", *(["arr_1"] if labels else []), RECORD]
        assert ours["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(ours["arr_0"], images)
        if labels:
            assert ours["arr_1"].dtype == np.int64 and ours["arr_1"].tolist() == labels
        assert json.loads(ours[RECORD]) == {**JOB, "finished": True}


def test_the_same_images_are_the_same_npz_file(tmp_path):
    for name, order in (("a", [0, 1, 2]), ("b", [2, 0, 1])):
        output = NpzFile(tmp_path / f"{name}.npz", batches())
        fill(output, order)
        output.finish()
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_npz_file_is_joined_in_the_memory_of_a_batch(tmp_path):
    output = NpzFile(tmp_path / "a.npz", Batches(range(64), None, 2, (256, 256, 3)))
    fill(output)
    tracemalloc.start()
    output.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.npz").stat().st_size > 64 * 256 * 256 * 3 and peak < 6 * 256 * 256 * 3


def test_the_folder_holds_a_png_a_seed(tmp_path):
    output = PngFolder(tmp_path, Batches([5, 1234567], None, 1, (4, 6, 1)))
    images = fill(output)
    assert {p.name for p in tmp_path.iterdir()} == {"000005.png", "1234567.png", RECORD}
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "000005.png")), images[0, :, :, 0])


def test_a_folder_has_no_place_for_a_seed_twice(tmp_path):
    with pytest.raises(ValueError, match="names 7 more than once"):
        PngFolder(tmp_path, Batches([7, 8, 7], None, 2, (4, 6, 1)))
    NpzFile(tmp_path / "a.npz", Batches([7, 8, 7], None, 2, (4, 6, 1)))


def test_other_settings_are_refused(output):
    fill(output)
    output.check(output.record(), dict(JOB))
    with pytest.raises(ValueError, match="begun with --steps 20, not 30;"):
        output.check(output.record(), job(steps=30, guidance=None))
    with pytest.raises(ValueError, match=r"begun with --guidance none, not 2\.0;"):
        output.check(output.record(), job(steps=20, guidance=2.0))
    with pytest.raises(ValueError, match="begun with --reuse none, not 3;"):
        output.check(output.record(), job(**SETTINGS, reuse=3))
    with pytest.raises(ValueError) as refused:
        output.check(output.record(), job(**{**SETTINGS, "steps": "1," * 100}))
    assert len(str(refused.value)) < 350


def test_the_folder_of_another_command_is_refused(output):
    fill(output)
    with pytest.raises(ValueError, match="holds the output of sample, not of restore; name another --out"):
        output.check(output.record(), {**JOB, "command": "restore"})


@pytest.mark.parametrize("name", ["000002.png", "grid.png", "holiday.jpg", "notes"])
def test_other_things_are_not_added_to(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"--out .* is not empty \({re.escape(name)}\); name a folder"):
        PngFolder(tmp_path, batches()).check(None, JOB)


def test_what_file_systems_put_into_a_folder_is_nothing(tmp_path):
    for name in (".DS_Store", "lost+found"):
        (tmp_path / name).touch()
    PngFolder(tmp_path, batches()).check(None, JOB)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="notes is a file; name a folder that is new or empty"):
        PngFolder(tmp_path / "notes", batches()).check(None, JOB)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": {}}', b'{"settings": 1, "finished": true}', b"\xff"])
def test_a_damaged_record_is_an_error_that_names_it(output, content):
    fill(output)
    (output.folder / RECORD).write_bytes(content)
    with pytest.raises(ValueError, match=RECORD):
        output.record()


def test_another_npz_file_is_refused(tmp_path):
    output = NpzFile(tmp_path / "a.npz", batches())
    for content in (b"", b"no archive"):
        output.path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz exists"):
            output.record()
    np.savez(output.path, arr_0=pictures(batches()))
    with pytest.raises(ValueError, match=r"a\.npz exists"):
        output.record()


def test_a_folder_of_names(tmp_path):
    folder = PngFolder(tmp_path, batches(3), ["boot", "coat-1", "bag.small"])
    images = fill(folder)
    np.testing.assert_array_equal(folder.read(1), images[2:])
    for name in (".coat-1.png.abcd_123", f".{RECORD}.abcd1234", ".comparison.png.abcd1234", ".notes.png.abcd1234"):
        (tmp_path / name).touch()
    assert folder.prepare(folder.record(), {}) == []
    folder.note(images={"boot": 1}, finished=True)
    assert folder.record() == {**JOB, "images": {"boot": 1}, "finished": True}
    assert folder.prepare(folder.record(), {}) is None
    names = {"boot.png", "coat-1.png", "bag.small.png", RECORD, ".notes.png.abcd1234"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with pytest.raises(ValueError, match=r"2 images would be bag\.png"):
        PngFolder(tmp_path, batches(3), ["bag", "boot", "bag"])


def test_remains_of_a_killed_process_are_removed(tmp_path):
    folder, file = PngFolder(tmp_path / "a", batches()), NpzFile(tmp_path / "a.npz", batches())
    fill(folder)
    before = sorted(folder.path.iterdir())
    kept = folder.path / ".notes.png.original"
    for name in (".000003.png.abcd_123", f".{RECORD}.abcd1234", ".grid.png.abcd1234", kept.name):
        (folder.path / name).write_bytes(b"half")
    folder.remove_remains()
    assert sorted(folder.path.iterdir()) == sorted([*before, kept])

    fill(file)
    file.remove_remains()
    assert file.folder.exists() and file.missing() == []
    file.finish()
    file.folder.mkdir()
    (file.folder / "joined.npz").write_bytes(b"")
    file.remove_remains()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.npz"]


def test_parts_stay_until_the_joined_file_is_found_whole(tmp_path, monkeypatch):
    file = NpzFile(tmp_path / "a.npz", batches())
    fill(file)
    before, fsync = sorted(file.folder.iterdir()), os.fsync

    def fsync_and_damage(descriptor):
        fsync(descriptor)
        os.pwrite(descriptor, b"?", 300)  # among the pixels

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_and_damage)
        with pytest.raises(OSError, match=r"joined\.npz is not as it was written: the disk may be failing; the same command"):
            file.finish()
    assert not file.path.exists() and sorted(p for p in file.folder.iterdir() if p.name != "joined.npz") == before
    file.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_an_archive_that_cannot_be_read_is_another_programs(tmp_path):
    output = NpzFile(tmp_path / "a.npz", batches())
    fill(output)
    output.finish()
    data = output.path.read_bytes()
    at = data.rindex(RECORD.encode()) - 46  # of its entry in the directory, whose compression is none that there is
    output.path.write_bytes(data[: at + 10] + b"\x63" + data[at + 11 :])
    with pytest.raises(ValueError, match=rf"a\.npz exists and has no {RECORD} of its settings; name another file"):
        output.record()
