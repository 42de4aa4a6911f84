"""Data sets that are decoded once into a file: the same images as from memory, whatever happens to the process or the file."""

import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddim_fast import UNet, UNetConfig
from ddim_fast.data import images as images_module
from ddim_fast.data.images import load_images
from ddim_fast.data.record import DataRecord
from ddim_fast.training.loop import Trainer, TrainingOptions

BYTES = 3 * 8 * 8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder, where there is memory for four images and files are written four at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 4 * 4 * BYTES)
    monkeypatch.setattr("ddim_fast.data.decoded._BLOCK", 4 * BYTES)
    return tmp_path / "cache" / "ddim_fast" / "decoded"


@pytest.fixture
def photos(tmp_path):
    """A folder of two classes, 18 pictures in all, of two sizes."""
    random = np.random.default_rng(0)
    for i in range(18):
        file = tmp_path / "photos" / f"class-{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8 + i % 3, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.fixture
def decoded(monkeypatch):
    """The places of what has been decoded since."""
    places, fit = [], images_module._fitted
    monkeypatch.setattr(images_module, "_fitted", lambda *a: (places.append(a[-1].place), fit(*a))[1])
    return places


def mapped(spec, **options):
    return load_images(str(spec), 3, 8, mapped=True, **options)


def assert_same(data, expected):
    assert torch.equal(data.images, expected.images) and data.images.dtype == torch.uint8
    assert data.labels.tolist() == expected.labels.tolist()
    assert (data.places, data.class_names, data.resized) == (expected.places, expected.class_names, expected.resized)
    assert list(data.left_out) == list(expected.left_out)


def test_what_fits_into_memory_stays_there(cache, photos, monkeypatch):
    monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 4 * 18 * BYTES)
    assert_same(mapped(photos), load_images(str(photos), 3, 8))
    assert not cache.exists()


@pytest.mark.parametrize("room", [0, 1, 4, 17])
def test_the_file_holds_what_memory_would(room, cache, photos, decoded, monkeypatch, capsys):
    monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 4 * room * BYTES)
    expected = load_images(str(photos), 3, 8)
    decoded.clear()
    assert_same(mapped(photos), expected)
    assert decoded == expected.places  # each once, though some were decoded into memory
    assert f"photos is decoded once, into {cache}" in capsys.readouterr().err
    assert_same(mapped(photos), expected)
    assert len(decoded) == 18 and capsys.readouterr().err == ""
    assert sorted(p.name for p in next(cache.iterdir()).iterdir()) == ["images.u8", "index.jsonl"]  # no lock is left


def test_a_training_gets_the_same_batches_as_from_memory(cache, photos):
    model = UNet(UNetConfig(sample_size=8, base_channels=8, channel_multipliers=(1,), norm_num_groups=4, num_classes=2))
    memory, file = (
        Trainer(model, data, TrainingOptions(steps=9, batch_size=5, seed=3))
        for data in (load_images(str(photos), 3, 8), mapped(photos))
    )
    assert file.data.images.untyped_storage().data_ptr() != memory.data.images.untyped_storage().data_ptr()
    for step in range(9):  # more than two epochs
        for one, other in zip(
            memory._images(memory.data, memory.indices(step)), file._images(file.data, file.indices(step)), strict=True
        ):
            assert torch.equal(one, other)


def test_parquet_files_are_decoded_into_a_file(cache, photos, tmp_path):
    stored = [{"bytes": file.read_bytes()} for file in sorted(photos.rglob("*.png"))]
    pq.write_table(pa.table({"image": stored, "label": [i % 3 for i in range(18)]}), tmp_path / "a.parquet", row_group_size=5)
    expected = load_images(str(tmp_path / "a.parquet"), 3, 8)
    for _ in range(2):
        assert_same(mapped(tmp_path / "a.parquet"), expected)
    assert len(list(cache.iterdir())) == 1


def test_a_hub_data_set_is_decoded_into_a_file(cache, photos, tmp_path, monkeypatch):
    rows = [{"image": {"bytes": None, "path": str(file)}} for file in sorted(photos.rglob("*.png"))]
    (tmp_path / "train.arrow").write_bytes(b"as downloaded")

    class Rows(list):
        column_names, cache_files = ("image",), [{"filename": str(tmp_path / "train.arrow")}]
        cast_column = lambda self, name, feature: self  # noqa: E731

    hub = SimpleNamespace(load_dataset=lambda name, split: Rows(rows), Image=lambda decode: None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    monkeypatch.chdir(tmp_path)
    expected = load_images("owner/name", 3, 8)
    assert torch.equal(mapped("owner/name").images, expected.images)
    (tmp_path / "train.arrow").write_bytes(b"another download")
    with pytest.raises(ValueError, match=r"owner/name has changed .*train\.arrow"):
        mapped("owner/name")


@pytest.mark.parametrize("labelled", [True, False])
def test_other_options_have_another_file(labelled, cache, photos):
    mapped(photos, labelled=labelled)
    expected = load_images(str(photos), 3, 8, labelled=not labelled)
    data = mapped(photos, labelled=not labelled)
    assert torch.equal(data.images, expected.images) and (data.labels is None) == labelled
    assert load_images(str(photos), 1, 8, mapped=True).images.shape == (18, 1, 8, 8)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("at", [1, 5, 8, 13, 17])
def test_a_killed_process_has_kept_what_it_had_decoded(at, cache, photos, decoded):
    expected = load_images(str(photos), 3, 8)
    child = os.fork()
    if child == 0:
        fit = images_module._fitted

        def die(*arguments):
            if arguments[-1].place == expected.places[at]:
                os.kill(os.getpid(), signal.SIGKILL)
            return fit(*arguments)

        images_module._fitted = die
        mapped(photos)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    decoded.clear()
    assert_same(mapped(photos), expected)
    # Before the fifth image all were in memory; later, blocks of four are kept.
    assert decoded == expected.places[at // 4 * 4 if at > 4 else 0 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda photos: (photos / "class-0" / "00.png").write_bytes((photos / "class-0" / "02.png").read_bytes()),
        lambda photos: os.utime(photos / "class-0" / "00.png", (1, 1)),
        lambda photos: (photos / "class-0" / "00.png").unlink(),
        lambda photos: shutil.copy(photos / "class-0" / "00.png", photos / "class-0" / "000.png"),
    ],
    ids=["content", "time", "gone", "new"],
)
def test_data_that_has_changed_is_refused(change, cache, photos):
    mapped(photos)
    change(photos)
    with pytest.raises(
        ValueError, match=r"photos has changed since .*/decoded/photos-\w+: .*00\.png', of 1 files; remove"
    ) as e:
        mapped(photos)
    assert "\n" not in str(e.value)
    shutil.rmtree(next(cache.iterdir()))
    assert_same(mapped(photos), load_images(str(photos), 3, 8))


def test_a_damaged_file_is_decoded_again_from_the_damage_on(cache, photos, decoded):
    expected = load_images(str(photos), 3, 8)
    kept = mapped(photos)  # in use meanwhile
    folder = next(cache.iterdir())
    pixels, index = (folder / "images.u8").read_bytes(), (folder / "index.jsonl").read_bytes()

    def damaged(at, content):
        content = bytearray(content)
        content[at] ^= 16
        return bytes(content)

    third = len(b"".join(index.splitlines(keepends=True)[:2])) + 20  # in the line of images 4 to 7
    for name, content, first in (
        ("images.u8", damaged(0, pixels), 0),
        ("images.u8", damaged(9 * BYTES, pixels), 8),
        ("images.u8", pixels[: 17 * BYTES], 16),
        ("images.u8", pixels + b"more", 18),
        ("images.u8", b"", 0),
        ("index.jsonl", damaged(3, index), 0),
        ("index.jsonl", damaged(third, index), 4),
        ("index.jsonl", index[:-5], 18),
        ("index.jsonl", b"", 0),
        ("index.jsonl", b"\xff\n\n{}", 0),
    ):
        decoded.clear()
        place = folder / name
        with open(place, "r+b") as file:  # in place, as a disk does it
            file.write(content)
            if name == "index.jsonl" or len(content) > len(pixels):
                file.truncate(len(content))
        if len(content) < len(pixels) and name == "images.u8":
            place.unlink()  # a shorter copy in its place; the mapping keeps the other one
            place.write_bytes(content)
        assert_same(mapped(photos), expected)
        assert decoded == expected.places[first:], (name, first)
        decoded.clear()
        assert_same(mapped(photos), expected)
        assert decoded == []
    assert torch.equal(kept.images, expected.images)


def test_of_processes_that_start_at_once_one_decodes_and_the_others_wait(cache, photos, monkeypatch):
    expected = load_images(str(photos), 3, 8)
    fit = images_module._fitted
    monkeypatch.setattr(images_module, "_fitted", lambda *a: (time.sleep(0.01), fit(*a))[1])
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            threading.Timer(60, os._exit, (2,)).start()
            os._exit(0 if torch.equal(mapped(photos).images, expected.images) else 1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    folder = next(cache.iterdir())
    assert (folder / "images.u8").stat().st_size == 18 * BYTES
    assert len((folder / "index.jsonl").read_bytes().splitlines()) == 1 + 5 + 1


def test_a_full_disk_is_named(cache, photos, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2:  # after the index's first line and a block
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddim_fast.data.decoded.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/images\.u8'"):
        mapped(photos)


@pytest.mark.parametrize("by_file", [True, False])
def test_bad_records_are_left_out_up_to_a_number(by_file, cache, photos, monkeypatch):
    if not by_file:
        monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 2**40)
    bad = [photos / "class-0" / "02.png", photos / "class-1" / "01.png"]
    bad[0].write_bytes(b"no image")
    bad[1].write_bytes(bad[1].read_bytes()[:60])
    with pytest.raises(ValueError, match=r"02\.png: not a readable image"):
        mapped(photos)
    with pytest.raises(ValueError, match=r"01\.png: not a readable image.*; 2 records cannot be read, and --max-bad is 1"):
        mapped(photos, max_bad=1)
    for _ in range(2):
        data = mapped(photos, max_bad=2)
        assert [place for place, _ in data.left_out] == list(map(str, bad))
        assert all("not a readable image" in reason for _, reason in data.left_out)
        assert len(data) == len(data.labels) == 16 and not {*map(str, bad)} & {*data.places}
        assert_same(data, load_images(str(photos), 3, 8, max_bad=2))
    with pytest.raises(ValueError, match=r"02\.png: not a readable image"):
        mapped(photos)  # the file remembers them
    assert cache.exists() == by_file


def test_the_record_of_a_run_lists_what_was_left_out(photos, tmp_path):
    (photos / "class-0" / "02.png").write_bytes(b"no image")
    data = load_images(str(photos), 3, 8, max_bad=1)
    record = DataRecord.of(str(photos), data)
    record.save(tmp_path)
    assert json.loads((tmp_path / "data.json").read_text())["left_out"][0][0].endswith("02.png")
    assert DataRecord.load(tmp_path) == record
    values = json.loads((tmp_path / "data.json").read_text())
    del values["left_out"]  # as version 0.1 wrote it
    (tmp_path / "data.json").write_text(json.dumps(values))
    assert DataRecord.load(tmp_path).left_out == [] and DataRecord.load(tmp_path).added(record) == 0


def test_a_picture_of_too_many_pixels_is_a_bad_record(photos, monkeypatch):
    Image.new("RGB", (40, 40)).save(photos / "class-0" / "02.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"02\.png: not a readable image \(40x40 pixels are more than 1,000"):
        load_images(str(photos), 3, 8)
    assert len(load_images(str(photos), 3, 8, max_bad=1)) == 17


def test_a_label_that_is_none_and_a_row_without_image_are_bad_records(photos, tmp_path):
    stored = [{"bytes": file.read_bytes()} for file in sorted(photos.rglob("*.png"))[:3]]
    pq.write_table(pa.table({"image": [*stored, None], "label": [1, -1, 0, 1]}), tmp_path / "a.parquet")
    data = load_images(str(tmp_path / "a.parquet"), 3, 8, max_bad=2)
    assert data.labels.tolist() == [1, 0]
    assert [reason for _, reason in data.left_out] == [
        f"{tmp_path}/a.parquet, row 1: class labels must be whole numbers from 0; got -1",
        f"{tmp_path}/a.parquet, row 3: its column has no encoded image",
    ]
