import numpy as np
import pytest
import torch
from PIL import Image

from ddim_fast.evaluation import reference as module
from ddim_fast.evaluation.frechet import FeatureStatistics, frechet_distance
from ddim_fast.evaluation.reference import load_reference
from ddim_fast.processes import Processes


def folder(path, count: int, size: int = 8, seed: int = 0):
    path.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{i:03d}.png")
    return path, torch.from_numpy(pixels).movedim(-1, 1)


def load(spec, network, shape=(3, 8, 8), **options):
    with Processes() as processes:
        return load_reference(str(spec), shape, network, processes, **options)


def test_statistics_of_a_folder_are_computed_once(tiny_network, tmp_path, cache, monkeypatch):
    path, pictures = folder(tmp_path / "a", 140)
    calls = []
    first = load(path, tiny_network, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(128, 140), (140, 140)]
    expected = FeatureStatistics(6)
    expected.update(tiny_network(pictures).numpy())
    assert first.images == first.statistics.count == 140 and first.resolution == (8, 8) and first.network == "tiny"
    assert frechet_distance(first.statistics, expected) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(first.features, tiny_network(pictures))
    assert [p.suffix for p in (cache / "references").iterdir()] == [".npz"]

    monkeypatch.setattr(module, "make_parts", lambda *a: pytest.fail("computed again"))
    again = load(path.rename(tmp_path / "b"), tiny_network)  # known by its pictures, not by its name
    np.testing.assert_array_equal(again.statistics.mean, first.statistics.mean)
    assert again.spec == str(tmp_path / "b")


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


@pytest.mark.parametrize(
    "arrays,words",
    [
        ({"mu": np.zeros(6)}, "needs mu, and sigma"),
        ({"mu": np.zeros(6), "sigma_upper": np.zeros(5)}, "sigma_upper has the shape"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "finite"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": np.zeros((3, 5))}, "features of shape"),
        ({"something": np.zeros(6)}, "no array 'arr_0'"),
    ],
)
def test_a_file_of_something_else_is_named(arrays, words, tiny_network, tmp_path):
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd\.npz.*" + words):
        load(tmp_path / "odd.npz", tiny_network)
