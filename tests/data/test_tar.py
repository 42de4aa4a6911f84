"""Tar files of images and labels, as WebDataset makes them."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast.data.images import load_images, native_shape, read_images
from ddim_fast.data.record import DataRecord
from ddim_fast.data.tar import expand_braces


def png(shade) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, files) -> str:
    """A tar file of names and contents, in this order."""
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return str(path)


def shades(data) -> list[int]:
    return data.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "label",
    [
        lambda n: (f"{n}.cls", b"%d\n" % n),
        lambda n: (f"{n}.json", json.dumps({"caption": "a", "label": n}).encode()),
    ],
    ids=["cls", "json"],
)
def test_shards_are_one_data_set_with_labels(label, tmp_path):
    for shard in range(3):
        files = [pair for n in (2 * shard, 2 * shard + 1) for pair in sorted([(f"{n}.png", png(10 * n)), label(n)])]
        write_tar(tmp_path / f"shard-{shard:03d}.tar", files)
    for spec in ("shard-{000..002}.tar", "shard-*.tar", "shard-00{0..2}.tar"):
        data = load_images(str(tmp_path / spec), 3, 8)
        assert shades(data) == [0, 10, 20, 30, 40, 50] and data.labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert data.class_names is None
        assert data.places[3] == f"{tmp_path}/shard-001.tar, row 1: '3'"
    assert load_images(str(tmp_path / "shard-{001..002}.tar"), 3, 8, labelled=False).labels is None
    assert shades(load_images(str(tmp_path / "shard-002.tar"), 3, 8)) == [40, 50]


def test_labels_that_are_names_become_classes(tmp_path):
    spec = write_tar(
        tmp_path / "a.tar",
        [(f"{i}.{k}", v) for i, c in enumerate((b"dog", b"cat", b"dog")) for k, v in (("cls", c), ("png", png(i)))],
    )
    data = load_images(spec, 3, 8)
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ("cat", "dog")
    data = load_images(spec, 3, 8, class_names=("dog", "zebra", "cat"))
    assert data.labels.tolist() == [0, 2, 0] and data.class_names == ("dog", "zebra", "cat")
    assert load_images(spec, 3, 8, num_classes=5).labels is None  # as of folders
    assert [label for *_, label in read_images(spec, class_names=("dog", "cat"))] == [0, 1, 0]
    record = DataRecord.of(spec, data)
    assert record.classes == {"dog": 2, "zebra": 0, "cat": 1} and list(record.files) == ["a.tar"]


def test_names_and_numbers_do_not_mix(tmp_path):
    spec = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(0)), ("1.cls", b"cat")])
    with pytest.raises(ValueError, match=r"a\.tar: some class labels are numbers and some are names, as 'cat'"):
        load_images(spec, 3, 8)
    assert load_images(spec, 3, 8, labelled=False).labels is None


def test_a_sample_without_a_label_leaves_all_without(tmp_path):
    spec = write_tar(
        tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"7"), ("1.png", png(1)), ("2.json", b"[]"), ("2.png", png(2))]
    )
    data = load_images(spec, 3, 8)
    assert data.labels is None and shades(data) == [0, 1, 2]


def test_other_files_and_masks_are_passed_over(tmp_path):
    files = [
        ("./README.txt", b"read me"),
        ("./._0.png", b"a Mac's notes"),
        ("./a/0.mask.png", png(99)),
        ("./a/0.png", png(1)),
        ("./a/0.txt", b"a caption"),
        ("./b/0.png", png(2)),
        ("./meta.json", b"{"),
    ]
    spec = write_tar(tmp_path / "a.tar", files)
    data = load_images(spec, 3, 8)
    assert shades(data) == [1, 2] and [p.partition(": ")[2] for p in data.places] == ["'./a/0'", "'./b/0'"]
    assert native_shape(spec) == (3, 8, 8)


@pytest.mark.parametrize(
    "files, message",
    [
        ([("1.png", b"no image")], r"row 1: '1': not a readable image"),
        ([("1.png", png(1)), ("1.cls", b"-1")], r"some class labels are numbers"),
        (
            [("1.png", png(1)), ("1.json", b'{"label": 0.5}')],
            r"row 1: '1': class labels must be whole numbers from 0; got 0\.5",
        ),
        ([("1.png", png(1)), ("1.json", b'{"label"')], r"row 1: '1': '1\.json' is not whole JSON"),
        ([("1.png", png(1)), ("1.json", b"[" * 100_000)], r"row 1: '1': '1\.json' is not whole JSON"),
        ([("1.png", png(1)), ("1.json", b" " * (2**20 + 1))], r"row 1: '1': '1\.json' has 1,048,577 bytes"),
        ([("1.cls", b"1")], r"row 1: '1': a \.cls file without an image; files of one sample must follow each other"),
        ([("1.a.png", png(1)), ("1.b.png", png(1))], r"row 1: '1': it has 2 images, '1\.a\.png' and '1\.b\.png'"),
        ([("1.png", png(1)), ("1.jpg", png(1))], r"row 1: '1': it has 2 images, '1\.png' and '1\.jpg'"),
    ],
)
def test_a_bad_sample_is_named_and_left_out_where_that_is_allowed(files, message, tmp_path):
    spec = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.cls", b"0"), *files, ("2.png", png(2)), ("2.cls", b"1")])
    with pytest.raises(ValueError, match=r"a\.tar.*" + message) as error:
        load_images(spec, 3, 8)
    assert "\n" not in str(error.value)
    if "some" not in message:
        data = load_images(spec, 3, 8, max_bad=1)
        assert shades(data) == [0, 2] and data.labels.tolist() == [0, 1] and len(data.left_out) == 1


def test_an_image_above_the_limit_of_pixels_is_a_bad_sample(tmp_path, monkeypatch):
    spec = write_tar(tmp_path / "a.tar", [("0.png", png(0)), ("1.png", png(1))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    with pytest.raises(ValueError, match=r"a\.tar, row 0: '0': not a readable image \(8x8 pixels are more than 63"):
        load_images(spec, 3, 8)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:700],  # in an image
        lambda b: b[:1024],  # between two files
        lambda b: b[:-10240],
        lambda b: b[:1030] + b"?" + b[1031:],  # in the second header
        lambda b: b"garbage" * 300,
        lambda b: b"",
        lambda b: b"\x1f\x8b" + b[2:],
    ],
)
def test_a_damaged_or_truncated_tar_is_named(damage, tmp_path):
    spec = write_tar(tmp_path / "a.tar", [(f"{i}.png", png(i)) for i in range(9)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(damage(whole))
    with pytest.raises(ValueError, match=r"a\.tar: not a whole tar file \(.*\); copy or download it again") as error:
        load_images(spec, 3, 8, max_bad=9)
    assert "\n" not in str(error.value)


def test_a_shard_that_is_missing_is_named(tmp_path):
    write_tar(tmp_path / "a-0.tar", [("0.png", png(0))])
    with pytest.raises(FileNotFoundError, match=r"there is no .*a-1\.tar; download it"):
        load_images(str(tmp_path / "a-{0..1}.tar"), 3, 8)
    with pytest.raises(FileNotFoundError, match=r"there is no .*a-1\.tar"):
        load_images(str(tmp_path / "a-{0..999999999}.tar"), 3, 8)  # not a list of a thousand million names


def test_a_tar_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no images in '.*a\.tar'"):
        load_images(write_tar(tmp_path / "a.tar", [("notes.txt", b"")]), 3, 8)


def test_ranges_in_braces():
    assert list(expand_braces("a-{08..10}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert list(expand_braces("{0..1}{8..9}")) == ["08", "09", "18", "19"]
    for text in ("plain.tar", "{9..0}.tar", "{a,b}.tar", "{..3}"):
        assert list(expand_braces(text)) == [text]


def test_shards_are_decoded_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ddim_fast.data.images.available_memory", lambda: 0)
    for shard in range(2):
        write_tar(
            tmp_path / f"a-{shard}.tar",
            [pair for i in range(3) for pair in ((f"{i}.png", png(9 * shard + i)), (f"{i}.cls", b"cat" if i else b"dog"))],
        )
    spec = str(tmp_path / "a-{0..1}.tar")
    expected = load_images(spec, 3, 8)
    for _ in range(2):
        data = load_images(spec, 3, 8, mapped=True)
        assert torch.equal(data.images, expected.images) and data.labels.tolist() == expected.labels.tolist() == [1, 0, 0] * 2
        assert data.places == expected.places and data.class_names == ("cat", "dog")
    assert np.prod(data.images.shape) == sum(p.stat().st_size for p in (tmp_path / "cache").rglob("images.u8"))
