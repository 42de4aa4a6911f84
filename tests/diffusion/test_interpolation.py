import pytest
import torch

from ddim_fast.diffusion.interpolation import between_all, slerp, slerp_grid


def noise(*seeds):
    return [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def test_the_ends_are_exact_and_the_way_is_an_arc():
    a, b = noise(1, 2)
    way = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(way[0], a) and torch.equal(way[-1], b)
    # Of unit vectors: every point on the sphere, every angle between neighbours the same.
    unit = slerp(a / a.norm(), b / b.norm(), torch.linspace(0, 1, 5)).flatten(1)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    cosines = (unit[1:] * unit[:-1]).sum(1)
    torch.testing.assert_close(cosines, cosines[:1].expand(4))


def test_noise_keeps_its_variance_where_a_straight_line_loses_it():
    a, b = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    middle = slerp(a, b, torch.tensor([0.5]))[0]
    assert middle.std() == pytest.approx(1.0, abs=0.02) and ((a + b) / 2).std() < 0.75


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_where_there_is_no_arc_it_is_the_line(factor):
    (a,) = noise(1)
    torch.testing.assert_close(slerp(a, factor * a, torch.tensor([0.25]))[0], a * (0.75 + 0.25 * factor), atol=1e-5, rtol=1e-5)


def test_nothing_and_something():
    a = torch.zeros(1, 2, 2)
    torch.testing.assert_close(slerp(a, a + 1, torch.tensor([0.5]))[0].norm(), torch.tensor(2**0.5))


def test_a_grid_has_its_corners():
    corners = torch.stack(noise(1, 2, 3, 4))
    grid = slerp_grid(corners, 3, 4).unflatten(0, (3, 4))
    for (row, column), corner in zip([(0, 0), (0, 3), (2, 0), (2, 3)], corners, strict=True):
        assert torch.equal(grid[row, column], corner)
    torch.testing.assert_close(grid[0], slerp(corners[0], corners[1], torch.linspace(0, 1, 4)))


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"cannot interpolate from noise of shape \(1, 2\) to \(2, 2\)"):
        slerp(torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1))


def test_between_all_divides_each_way_into_equal_parts():
    points = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    between = between_all(points, 4)
    assert between.shape == (6, 2, 4, 4) and between_all(points, 2).shape == (2, 2, 4, 4)
    whole = slerp(points[1], points[2], torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(between[3:], whole)
