import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast import save_images, to_pil
from ddim_fast.io.pictures import image_grid, save_gif, save_image, to_uint8


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5]).view(1, 1, 6)
    assert to_uint8(values)[:, :, 0].tolist() == [[0, 0, 128, 255, 255, 191]]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.tensor, lambda values: np.array(values, np.float16)])
def test_numbers_that_are_none_make_no_picture(kind, number):
    """A network that overflows in float16 shows itself so; as bytes they would be black."""
    for make in (to_uint8, to_pil, lambda image: image_grid(image[None])):
        with pytest.raises(ValueError, match=r"the images are not finite; try dtype float32 \(--dtype float32\)"):
            make(kind([[[0.0, number]]]))


def test_uint8_images_come_back_exactly():
    pixels = torch.arange(256, dtype=torch.float32)
    assert to_uint8((pixels / 127.5 - 1).view(1, 16, 16)).ravel().tolist() == list(range(256))


def test_the_grid_fills_rows_first():
    sheet = image_grid(torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4), columns=3, gap=1)
    assert sheet.shape == (11, 16, 1)
    assert sheet[1:5, [1, 6, 11], 0].tolist() == [[0, 64, 128]] * 4
    assert sheet[6:10, [1, 6], 0].tolist() == [[191, 255]] * 4
    assert (sheet[6:10, 11] == 255).all() and (sheet[5] == 255).all()


def test_saved_pictures_are_lossless_and_enlarged(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_image(tmp_path / "a.png", picture, scale=2)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png"))[::2, ::2], picture)
    with pytest.raises(ValueError, match=r"b\.nope"):
        save_image(tmp_path / "b.nope", picture)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.double, torch.Tensor.bfloat16])
@pytest.mark.parametrize("channels,mode", [(1, "L"), (3, "RGB")])
def test_pillows_images_are_clipped(channels, mode, convert):
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5]).expand(2, channels, 1, 6)
    images = to_pil(convert(values))
    assert [(image.mode, image.size) for image in images] == [(mode, (6, 1))] * 2
    for image in (*images, *to_pil(convert(values[0]))):
        assert np.asarray(image).reshape(6, channels).T.tolist() == [[0, 0, 128, 255, 255, 191]] * channels


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_images_are_saved_by_number(kind, tmp_path):
    images = kind([[[[i / 5.5 - 1.0]]] for i in range(11)])
    folder = tmp_path / "new" / "folder"
    paths = save_images(images, str(folder))
    assert paths == sorted(folder.iterdir()) and [p.name for p in paths] == [f"{i:02}.png" for i in range(11)]
    assert [np.asarray(Image.open(p)).item() for p in paths] == to_uint8(images).ravel().tolist()
    assert save_images(images[:1], tmp_path) == [tmp_path / "0.png"]
    (tmp_path / "v0.1").mkdir()
    assert save_images(images[0], tmp_path / "v0.1") == [tmp_path / "v0.1" / "0.png"]
    assert save_images(images[:0], tmp_path / "none") == []


def test_one_file_holds_one_image_or_a_grid(tmp_path):
    images = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for one in (images[1], images[1:]):
        (path,) = save_images(one, tmp_path / "new" / "a.png")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), to_uint8(images[1]))
    (path,) = save_images(images, tmp_path / "all.png")
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image_grid(images))


@pytest.mark.parametrize(
    "images,message",
    [
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), r"got torch\.uint8: convert 8-bit images by images / 127\.5 - 1"),
        (np.zeros((3, 2, 2), np.int64), "floating-point numbers in .* got int64"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.bool), r"got torch\.bool"),
        (torch.zeros(2, 2), r"shape \(N, C, H, W\) or \(C, H, W\); got shape \(2, 2\)"),
        ([1.0], "got list"),
        (np.zeros((8, 8, 3)), r"images of 8 channels are no pictures.*\(C, H, W\)"),
        (torch.zeros(1, 3, 2, 2) / 0, "not finite"),
    ],
)
def test_what_makes_no_pictures_is_refused(images, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_pil(images)
    for path in ("a", "b/a.png"):
        with pytest.raises(ValueError, match=message):
            save_images(images, tmp_path / path)
    assert not any(tmp_path.iterdir())


def test_a_file_that_can_hold_no_image_is_refused(tmp_path):
    for images, name, message in (
        (torch.zeros(1, 3, 2, 2), "a.pgn", r"a\.pgn: unknown image format; name a \.png file"),
        (torch.zeros(0, 3, 2, 2), "a.png", "at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            save_images(images, tmp_path / "new" / name)
    assert not any(tmp_path.iterdir())


def test_a_film_has_all_its_frames(tmp_path):
    frames = [np.full((4, 4, 1), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, hold=500)
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 3
    film.seek(2)
    assert film.info["duration"] == 500
    assert np.asarray(film.convert("L")).tolist() == [[200] * 4] * 4
