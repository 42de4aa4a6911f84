import io
import json
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ddim_fast.evaluation.pictures import describe, read_pictures, stored_pictures, survey


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_npz_file_and_a_folder_are_read_as_they_are(tmp_path):
    rgb = pixels(3, 8, 8, 3)
    np.savez(tmp_path / "a.npz", arr_0=rgb, arr_1=np.arange(3))
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(rgb):
        Image.fromarray(picture).save(tmp_path / "folder" / f"{i}.png")
    for spec in ("a.npz", "folder"):
        np.testing.assert_array_equal(read_pictures(str(tmp_path / spec)).numpy(), rgb.transpose(0, 3, 1, 2))
        for picture, expected in zip(stored_pictures(str(tmp_path / spec)), rgb, strict=True):
            np.testing.assert_array_equal(picture.movedim(0, -1), expected)


def test_each_picture_of_a_folder_keeps_its_size_and_colours(tmp_path):
    arrays = [pixels(8, 8, 3), pixels(5, 9), pixels(30, 20, 3)]
    for i, picture in enumerate(arrays):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    found = list(stored_pictures(str(tmp_path)))
    assert [tuple(p.shape) for p in found] == [(3, 8, 8), (1, 5, 9), (3, 30, 20)]
    for picture, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(picture.movedim(0, -1).squeeze(-1), array)
    assert describe(survey(found).shapes) == "5x9 to 30x20 grey and RGB" and describe([(1, 8, 8)]) == "8x8 grey"


def test_pictures_are_told_apart_by_their_shapes_and_by_their_values():
    shapes = [(2, 1, 4, 9), (2, 1, 9, 4), (2, 1, 6, 6), (1, 1, 4, 9)]
    sets = [torch.full(shape, value, dtype=torch.uint8) for shape in shapes for value in (0, 1)]
    assert len({survey(pictures).content for pictures in sets}) == 8
    assert survey(sets[0]) == survey(list(sets[0].clone()))


@pytest.mark.parametrize("picture", ["grid.png", "comparison.png"])
def test_the_folder_of_a_job_is_read_without_the_picture_of_all(picture, tmp_path):
    for i in range(2):
        Image.fromarray(pixels(8, 8)).save(tmp_path / f"{i:06d}.png")
    Image.fromarray(pixels(20, 20)).save(tmp_path / picture)
    record = {"settings": {}, "finished": True}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert read_pictures(str(tmp_path)).shape == (2, 1, 8, 8)
    (tmp_path / "record.json").write_text(json.dumps(record | {"finished": False}))
    for read in (read_pictures, lambda spec: next(stored_pictures(spec))):
        with pytest.raises(ValueError, match=r"record\.json.*not finished"):
            read(str(tmp_path))
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(ValueError, match=r"record\.json: not a JSON object"):
        read_pictures(str(tmp_path))


@pytest.mark.parametrize(
    "array,words",
    [
        (np.full((2, 4, 4, 3), np.nan, np.float32), "float32 and has NaN"),
        (np.zeros((2, 4, 4, 3)), "must be uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"shape \(N, H, W, 1 or 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no pictures"),
    ],
)
def test_what_is_no_picture_is_named(array, words, tmp_path):
    np.savez(tmp_path / "odd.npz", arr_0=array)
    with pytest.raises(ValueError, match=r"odd\.npz: .*" + words):
        read_pictures(str(tmp_path / "odd.npz"))


def test_files_that_cannot_be_read_are_named(tmp_path):
    np.savez(tmp_path / "whole.npz", arr_0=pixels(50, 8, 8, 3))
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[:900])
    flipped = bytearray(data)
    flipped[2000] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(bytes(flipped))
    np.savez(tmp_path / "code.npz", arr_0=np.array([{}], dtype=object))
    for name, shape in (("huge", b"(999999999999, 8, 8, 3)}"), ("overflow", b"(%d,)}" % 10**30), ("open", b"(")):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as file:
            header = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape
            file.writestr("arr_0.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
    later = data.replace(b"PK\1\2\x2d\3\x2d", b"PK\1\2\x2d\3\x7b")  # of version 12.3 of the archive's format
    assert later != data
    (tmp_path / "later.npz").write_bytes(later)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    (tmp_path / "text.npz").write_bytes(zipped.getvalue())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**34, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(9))
    (tmp_path / "odd.npz").write_bytes(data.replace(b"'fortran_order'", b"'for(ran_order'"))
    with pytest.raises(ValueError, match=r"large\.npz: array 'arr_0' is damaged \(its header says"):  # not MemoryError
        read_pictures(str(tmp_path / "large.npz"))
    for name in ("cut", "flipped", "code", "huge", "overflow", "open", "later", "text", "odd"):
        with pytest.raises(ValueError, match=rf"{name}\.npz"):
            read_pictures(str(tmp_path / f"{name}.npz"))
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        read_pictures(str(tmp_path / "absent.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        read_pictures(str(tmp_path / "empty"))
    (tmp_path / "wide").mkdir()
    Image.fromarray(pixels(8, 9, 3)).save(tmp_path / "wide" / "a.png")
    with pytest.raises(ValueError, match="wide: pictures must be square; these are 8x9 RGB"):
        read_pictures(str(tmp_path / "wide"))
    (tmp_path / "wide" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        read_pictures(str(tmp_path / "wide"))


def test_labels_of_a_reference_are_not_looked_at(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(pixels(8, 8, 3)).save(encoded, "PNG")
    table = pa.table({"image": [{"bytes": encoded.getvalue(), "path": "a.png"}], "label": ["cat"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [tuple(picture.shape) for picture in stored_pictures(str(tmp_path / "a.parquet"))] == [(3, 8, 8)]
