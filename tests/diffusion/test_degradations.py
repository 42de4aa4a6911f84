import pytest
import torch

from ddim_fast.diffusion.degradations import Blur, CompressedSensing, Downscale, Grey, Mask

SIZE = (8, 16)
OPERATORS = {
    "mask": Mask(torch.rand(SIZE, generator=torch.Generator().manual_seed(0)) < 0.5),
    "mask of channels": Mask(torch.rand((3, *SIZE), generator=torch.Generator().manual_seed(0)) < 0.5),
    "downscale": Downscale(4),
    "grey": Grey(3),
    "blur": Blur(SIZE, 1.0),
    "blur wider than the image": Blur(SIZE, 6.0),
    "compressed sensing": CompressedSensing(SIZE, 0.25),
}


def images(n=3):
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]


def test_the_pseudo_inverse_gives_back_what_was_seen(operator):
    """The four equations of Penrose, the last two as inner products."""
    x, other = images(), images(5)[2:]
    y = operator(x)
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y, atol=1e-4, rtol=1e-4)
    seen = operator.pseudo_inverse(y)
    torch.testing.assert_close(operator.pseudo_inverse(operator(seen)), seen, atol=1e-3, rtol=1e-3)
    project = lambda z: operator.pseudo_inverse(operator(z))  # noqa: E731
    torch.testing.assert_close((project(x) * other).sum(), (x * project(other)).sum(), atol=1e-2, rtol=1e-3)


def test_gain_is_what_the_pseudo_inverse_makes_of_noise(operator):
    y = operator(images(1))
    noise = torch.randn(4000, *y.shape[1:], generator=torch.Generator().manual_seed(2))
    power = operator.pseudo_inverse(noise).square().mean()
    if isinstance(operator, Mask):  # of the pixels that are known
        power = power / operator.known.mean()
    assert power.sqrt().item() == pytest.approx(operator.gain, rel=0.02)


def test_a_constant_image_stays_as_it_is_when_blurred():
    torch.testing.assert_close(Blur(SIZE, 1.5)(torch.ones(1, 1, *SIZE)), torch.ones(1, 1, *SIZE))


def test_a_blur_spreads_a_point_as_a_gaussian_does():
    x = torch.zeros(1, 1, 33, 33)
    x[0, 0, 16, 16] = 1
    blurred = Blur((33, 33), 1.0, smallest=0.0)(x)[0, 0]
    weights = torch.exp(-0.5 * torch.arange(-16.0, 17) ** 2)
    torch.testing.assert_close(blurred, torch.outer(weights, weights) / weights.sum() ** 2, atol=1e-5, rtol=0)


def test_compressed_sensing_of_everything_loses_nothing():
    operator = CompressedSensing(SIZE, 1.0)
    torch.testing.assert_close(operator.pseudo_inverse(operator(images())), images())
    assert not torch.equal(CompressedSensing(SIZE, 0.5, seed=1).chosen, CompressedSensing(SIZE, 0.5).chosen)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Mask(torch.ones(4)), r"a mask has the shape \(H, W\) or \(C, H, W\) of an image; got \(4,\)"),
        (lambda: Mask(torch.ones(3, 8, 16))(images()[:, :2]), "does not fit"),
        (lambda: Mask(torch.ones(4, 4))(images()), r"a mask of shape \(4, 4\) does not fit images of shape \(.*8, 16\)"),
        (lambda: Downscale(1), "a scale factor is a whole number of 2 or more; got 1"),
        (lambda: Downscale(3)(images()), "images of 8x16 pixels cannot be divided by the scale factor 3"),
        (lambda: Grey(1), "no colours to restore"),
        (lambda: Blur(SIZE, 0.0), "sigma must be a positive number of pixels; got 0.0"),
        (lambda: Blur((8, 8), 1.0)(images()), "a blur of 8x8 does not fit images of 8x16"),
        (lambda: CompressedSensing((6, 6), 0.5), "power of 2; got 6x6"),
        (lambda: CompressedSensing(SIZE, 0.0), r"must lie in \(0, 1\]; got 0.0"),
        (lambda: CompressedSensing((8, 8), 0.5)(images()), "is of images of 8x8, not 8x16"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_rectangles():
    rectangles = Mask.outside((4, 6), [(1, 0, 2, 3), (5, 3, 1, 1)])
    known = torch.ones(4, 6)
    known[0:3, 1:3] = known[3, 5] = 0
    assert torch.equal(rectangles(torch.ones(1, 1, 4, 6)), known[None, None])


@pytest.mark.parametrize("rectangle", [(3, 0, 4, 1), (0, 2, 1, 3), (0, 0, 0, 2), (-1, 0, 2, 2)])
def test_a_rectangle_lies_in_the_image(rectangle):
    with pytest.raises(ValueError, match="does not lie in an image of 6 pixels by 4"):
        Mask.outside((4, 6), [(0, 0, 1, 1), rectangle])


@pytest.mark.parametrize("factor", [2, 4])
def test_rounding_keeps_the_means_of_squares(factor):
    """Of images that leave [-1, 1] as well, and of ones that are black or white but for a pixel."""
    operator, generator = Downscale(factor), torch.Generator().manual_seed(0)
    means = torch.randint(0, 256, (3, 2, 8, 8), generator=generator) / 127.5 - 1
    means[0, 0, 0, :3] = torch.tensor([-1.0, 1.0, 1 / 127.5 - 1])
    x = torch.randn(3, 2, 8 * factor, 8 * factor, generator=generator)
    x = x - operator.pseudo_inverse(operator(x) - means)
    rounded = operator.rounded(x)
    levels = (rounded + 1) * 127.5
    assert rounded.abs().max() <= 1 < x.abs().max()
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(operator(rounded), means, atol=1e-6, rtol=0)
    inside = x * 0.1
    assert (operator.rounded(inside) - inside).abs().max() <= 1 / 127.5 + 1e-6


def test_rounding_finds_the_nearest_images_with_these_means():
    """Two pixels above 1 are clipped, and the others take what is lost, in equal parts."""
    x = torch.tensor([[1.4, 1.2], [0.2, -0.4]])[None, None]
    expected = torch.tensor([[1.0, 1.0], [0.5, -0.1]])
    torch.testing.assert_close(Downscale(2).rounded(x)[0, 0], expected, atol=1 / 127.5, rtol=0)


def test_other_operators_round_to_the_nearest_level():
    mask = OPERATORS["mask"]
    levels = torch.arange(128.0).view(1, 1, *SIZE) / 63.75 - 1
    torch.testing.assert_close(mask.rounded(levels + 0.001), levels, atol=1e-6, rtol=0)
    assert mask.rounded(levels * 3).abs().max() == 1
