import numpy as np
import pytest
from PIL import Image

from ddim_fast.data.images import load_images
from ddim_fast.data.resizing import Resizer, fit_image


def halves(width, height):
    """Black on the left, white on the right."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_crop_keeps_the_middle_and_frames_what_is_small():
    assert np.array_equal(fit_image(halves(40, 20), 1, 10)[0], np.asarray(halves(20, 20).resize((10, 10), Image.LANCZOS)))
    small = fit_image(Image.new("L", (6, 4), 200), 1, 10)[0]
    assert small[3:7, 2:8].min() == 200 and small.sum() == 200 * 24
    assert fit_image(Image.new("L", (30, 4), 200), 1, 10)[0].sum() == 200 * 40
    assert np.array_equal(fit_image(halves(10, 10), 3, 10)[1], np.asarray(halves(10, 10)))


@pytest.mark.parametrize("size", [(40, 20), (4, 2), (20, 10)])
def test_pad_keeps_all_of_a_picture(size):
    padded = fit_image(halves(*size), 1, 20, "pad")[0]
    assert not padded[:5].any() and not padded[15:].any()
    assert padded[5:15, :7].max() < 60 and padded[5:15, 13:].min() > 200


def test_pad_keeps_a_line_of_a_very_long_picture():
    assert (fit_image(Image.new("L", (1000, 2), 255), 1, 10, "pad")[0].max(1) > 0).sum() == 1


@pytest.mark.parametrize("size", [(40, 20), (4, 2), (5, 31)])
def test_stretch_fills_the_square(size):
    stretched = fit_image(halves(*size), 1, 20, "stretch")[0]
    assert stretched[:, :4].max() < 80 and stretched[:, -4:].min() > 180


@pytest.mark.parametrize(
    "how,size,done",
    [
        ("crop", (640, 480), "cropped to a square in the middle and resized"),
        ("crop", (64, 64), "resized"),
        ("crop", (28, 28), "put into a black frame"),
        ("crop", (100, 20), "its middle put into a black frame"),
        ("pad", (640, 480), "resized into a black frame"),
        ("pad", (28, 28), "resized"),
        ("stretch", (640, 480), "stretched"),
        ("stretch", (28, 28), "resized"),
    ],
)
def test_what_was_done_is_said(how, size, done):
    resizer = Resizer(32, how)
    assert resizer.fit("a.png", Image.new("RGB", (32, 32)), 3).shape == (3, 32, 32) and resizer.line is None
    resizer.fit("b.png", Image.new("RGB", size), 3)
    was = f"b.png, {size[0]}x{size[1]}, was brought to 32x32: {done}"
    assert resizer.line == f"{was} (--resize names another way)"
    resizer.note("c.png", size)
    assert resizer.line == f"2 images were brought to 32x32: {done} (--resize names another way)"


def test_of_several_ways_each_has_its_number():
    resizer = Resizer(32, "crop")
    for size in ((640, 480), (480, 640), (28, 28)):
        resizer.note("a", size)
    assert resizer.line is not None
    assert "3 images were brought to 32x32: 2 cropped to a square in the middle and resized, 1 put into" in resizer.line


def test_of_training_data_nothing_can_be_chosen():
    resizer = Resizer(32)
    resizer.note("a", (28, 28))
    assert resizer.line == "a, 28x28, was brought to 32x32: put into a black frame"
    with pytest.raises(ValueError, match="--resize squeeze: there are crop, pad, stretch"):
        Resizer(32, "squeeze")


def test_images_to_work_on_are_of_any_sizes_and_training_data_are_not(tmp_path):
    for name, size in (("a", (40, 30)), ("b", (6, 5))):
        Image.new("L", size, 255).save(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match="must all have one size"):
        load_images(str(tmp_path), 1, 8)
    assert load_images(str(tmp_path), 1, 8, resizer=Resizer(8, "stretch")).images.eq(255).all()
