import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast.io.pictures import image_grid, save_gif, save_image, to_uint8


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 0.5]).view(1, 1, 6)
    assert to_uint8(values)[:, :, 0].tolist() == [[0, 0, 128, 255, 255, 191]]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.tensor, lambda values: np.array(values, np.float16)])
def test_numbers_that_are_none_make_no_picture(kind, number):
    """A network that overflows in float16 shows itself so; as bytes they would be black."""
    for make in (to_uint8, lambda image: image_grid(image[None])):
        with pytest.raises(ValueError, match="the images are not finite; try --dtype float32"):
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


def test_a_film_has_all_its_frames(tmp_path):
    frames = [np.full((4, 4, 1), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, hold=500)
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 3
    film.seek(2)
    assert film.info["duration"] == 500
    assert np.asarray(film.convert("L")).tolist() == [[200] * 4] * 4
