import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast.evaluation import reference as module
from ddim_fast.evaluation.frechet import FeatureStatistics, frechet_distance
from ddim_fast.evaluation.pictures import survey
from ddim_fast.evaluation.reference import load_reference
from ddim_fast.io.processes import Processes


def folder(path, count: int, *sizes: tuple[int, ...]):
    """Of pictures of (8, 8, 3), or of these sizes in turn."""
    path.mkdir()
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (sizes or ((8, 8, 3),))[i % max(1, len(sizes))], dtype=np.uint8) for i in range(count)]
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{i:03d}.png")
    return path, [torch.from_numpy(np.atleast_3d(picture)).movedim(-1, 0) for picture in pixels]


def load(spec, network, shape=(3, 8, 8), **options):
    with Processes() as processes:
        return load_reference(str(spec), shape, network, processes, **options)


def test_statistics_of_a_folder_are_computed_once(tiny_network, tmp_path, cache, monkeypatch):
    path, pictures = folder(tmp_path / "a", 140)
    calls = []
    first = load(path, tiny_network, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(128, 140), (140, 140)]
    expected = FeatureStatistics(6)
    pictures = torch.stack(pictures)
    expected.update(tiny_network(pictures).numpy())
    assert first.images == first.statistics.count == 140 and first.resolution == (8, 8) and first.network == "tiny"
    assert frechet_distance(first.statistics, expected) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(first.features, tiny_network(pictures))
    assert [p.suffix for p in (cache / "references").iterdir()] == [".npz"]

    monkeypatch.setattr(module, "make_shards", lambda *a: pytest.fail("computed again"))
    again = load(path.rename(tmp_path / "b"), tiny_network)  # known by its pictures, not by its name
    np.testing.assert_array_equal(again.statistics.mean, first.statistics.mean)
    assert again.spec == str(tmp_path / "b")


@pytest.mark.parametrize(
    "channels,sizes,words",
    [
        (3, [(8, 8, 3)], ""),
        (3, [(4, 4, 3)], "4x4 RGB"),
        (3, [(32, 24, 3)], "32x24 RGB"),
        (3, [(8, 8)], "8x8 grey"),
        (1, [(8, 8)], ""),
        (1, [(8, 8, 3)], "8x8 RGB"),
        (3, [(8, 8), (5, 7, 3), (20, 20, 3)], "5x7 to 20x20 grey and RGB"),
    ],
)
def test_pictures_of_a_folder_are_seen_as_they_are_stored(channels, sizes, words, tiny_network, tmp_path):
    """Not in a black frame, not cropped, neither grey nor coloured as the images are; and the difference is said."""
    path, pictures = folder(tmp_path / "a", 12, *sizes)
    found = load(path, tiny_network, (channels, 8, 8))
    torch.testing.assert_close(found.features, torch.cat([tiny_network(picture[None]) for picture in pictures]))
    assert found.pictures == words and found.resolution == (None if len(sizes) > 1 else sizes[0][:2])


def test_other_weights_do_not_get_the_statistics_of_these(tiny_network, tmp_path):
    path, _ = folder(tmp_path / "a", 20)
    first = load(path, tiny_network)
    with torch.no_grad():
        for parameter in tiny_network.network.parameters():
            parameter.add_(1)
    tiny_network.name = "tiny sha256:0123456789abcdef"
    other = load(path, tiny_network)
    assert not torch.equal(other.features, first.features) and other.content == first.content
    first.save(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=r"s\.npz: statistics of the feature network 'tiny', not of 'tiny sha256:0123"):
        load(tmp_path / "s.npz", tiny_network)


def test_a_folder_that_changes_while_it_is_read_is_an_error(tiny_network, tmp_path, monkeypatch):
    path, _ = folder(tmp_path / "a", 129)  # its second part is of one picture

    def look(pictures):
        found = survey(pictures)
        next(path.iterdir()).unlink()
        return found

    monkeypatch.setattr(module, "survey", look)
    with pytest.raises(ValueError, match="a: its pictures changed while they were read"):
        load(path, tiny_network)


def test_a_stopped_computation_goes_on(tiny_network, tmp_path, cache):
    path, _ = folder(tmp_path / "a", 300)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(path, tiny_network, progress=stop)
    calls = []
    load(path, tiny_network, progress=lambda done, total: calls.append(done))
    assert calls == [256, 300]


def test_a_saved_reference_is_a_file_of_statistics(tiny_network, tmp_path):
    path, _ = folder(tmp_path / "a", 20)
    reference = load(path, tiny_network)
    reference.save(tmp_path / "statistics.npz")
    again = load(tmp_path / "statistics.npz", tiny_network)
    np.testing.assert_allclose(again.statistics.covariance, reference.statistics.covariance, rtol=1e-12)
    assert again.images == 20 and torch.equal(again.features, reference.features)


@pytest.mark.parametrize("upper", [True, False])
def test_statistics_of_other_programs_are_read(upper, tiny_network, tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 6))
    sigma = np.cov(rows, rowvar=False)
    arrays = {"sigma_upper": sigma[np.triu_indices(6)], "count": np.int64(50)} if upper else {"sigma": sigma}
    np.savez(tmp_path / "s.npz", mu=rows.mean(0), **arrays)
    reference = load(tmp_path / "s.npz", tiny_network)
    np.testing.assert_allclose(reference.statistics.covariance, sigma)
    assert reference.features is None and reference.network is None and reference.images == (50 if upper else None)


def test_what_cannot_be_compared_is_refused(tiny_network, tmp_path):
    path, _ = folder(tmp_path / "a", 20)
    load(path, tiny_network).save(tmp_path / "s.npz")
    with pytest.raises(ValueError, match=r"s\.npz: statistics of 8x8 pictures cannot be compared with pictures of 16x16"):
        load(tmp_path / "s.npz", tiny_network, (3, 16, 16))
    tiny_network.name = "another"
    with pytest.raises(ValueError, match=r"s\.npz: statistics of the feature network 'tiny', not of 'another'"):
        load(tmp_path / "s.npz", tiny_network)
    np.savez(tmp_path / "wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=r"wide\.npz: statistics of 7 features; another has 6"):
        load(tmp_path / "wide.npz", tiny_network)
    path, _ = folder(tmp_path / "one", 1)
    with pytest.raises(ValueError, match="one: statistics need at least 2 pictures; there is 1"):
        load(path, tiny_network)


@pytest.mark.parametrize("beside", [{}, {"mu": np.zeros(6), "sigma": np.eye(6)}])
@pytest.mark.parametrize("shape", [(16, 16, 3), (8, 8, 1)])
def test_pictures_in_an_npz_file_must_be_like_the_images_beside_statistics_too(beside, shape, tiny_network, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((4, *shape), np.uint8), **beside)
    described = f"{shape[0]}x{shape[1]} {'RGB' if shape[2] == 3 else 'grey'}"
    with pytest.raises(ValueError, match=rf"s\.npz: its pictures are {described}, not 8x8 RGB"):
        load(tmp_path / "s.npz", tiny_network)
    reference = load(tmp_path / "s.npz", tiny_network, (shape[2], *shape[:2]))
    assert (reference.features is None) == bool(beside)


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"mu": np.zeros(6)}, "needs the arrays mu and either sigma"),
        ({"mu": np.zeros(6), "sigma_upper": np.zeros(5)}, "sigma_upper has the shape"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "finite"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": np.zeros((3, 5))}, "features of shape"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": np.full((3, 6), np.nan)}, "features must be finite"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": np.zeros(6)}, "features must have 2 axes"),
        ({"mu": np.float64(0), "sigma_upper": np.zeros(1)}, "mu must have 1 axis"),
        ({"mu": np.zeros(6), "sigma": np.eye(6) * 1j}, "sigma must be finite numbers"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "count": np.array("many")}, "count must be finite numbers"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "count": np.arange(2)}, "size 1"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "resolution": np.arange(3)}, "resolution must be a height and a width"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "arr_0": np.zeros((2, 8, 8, 3))}, "pictures must be uint8"),
        ({"something": np.zeros(6)}, "no array 'arr_0'"),
    ],
)
def test_a_file_of_something_else_is_named(arrays, words, tiny_network, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd\.npz.*" + words):
        load(tmp_path / "odd.npz", tiny_network)
