import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ddim_fast.evaluation.pictures import read_pictures


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
    grey = read_pictures(str(tmp_path / "folder"), (1, 16, 16))
    assert grey.shape == (3, 1, 16, 16) and not grey[:, :, :4].any()
    with pytest.raises(ValueError, match=r"a\.npz: its pictures are 8x8 RGB, not 16x16 grey"):
        read_pictures(str(tmp_path / "a.npz"), (1, 16, 16))


@pytest.mark.parametrize("job,picture", [("sampling", "grid.png"), ("restoration", "comparison.png")])
def test_the_folder_of_a_job_is_read_without_the_picture_of_all(job, picture, tmp_path):
    for i in range(2):
        Image.fromarray(pixels(8, 8)).save(tmp_path / f"{i:06d}.png")
    Image.fromarray(pixels(20, 20)).save(tmp_path / picture)
    record = {"settings": {}, "finished": True}
    (tmp_path / f"{job}.json").write_text(json.dumps(record))
    assert read_pictures(str(tmp_path)).shape == (2, 1, 8, 8)
    (tmp_path / f"{job}.json").write_text(json.dumps(record | {"finished": False}))
    with pytest.raises(ValueError, match=rf"{job}\.json.*not finished"):
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
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    (tmp_path / "text.npz").write_bytes(zipped.getvalue())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**34, 8, 8, 3)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(9))
    (tmp_path / "odd.npz").write_bytes(data.replace(b"'fortran_order'", b"'for(ran_order'"))
    with pytest.raises(ValueError, match=r"huge\.npz: array 'arr_0' is damaged \(its header says"):  # not MemoryError
        read_pictures(str(tmp_path / "huge.npz"))
    for name in ("cut", "flipped", "code", "text", "odd"):
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
