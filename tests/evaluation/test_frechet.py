import numpy as np
import pytest

from ddim_fast.evaluation.frechet import FeatureStatistics, frechet_distance


def statistics(rows) -> FeatureStatistics:
    result = FeatureStatistics(np.shape(rows)[1])
    result.update(rows)
    return result


def samples(seed: int, count: int, dimensions: int, mean: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, dimensions)) @ random.normal(size=(dimensions, dimensions)) + mean


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_batches_and_merges_give_the_statistics_of_all_rows(mean):
    rows = samples(0, 97, 5, mean)
    expected = np.cov(rows, rowvar=False)
    streamed, merged = FeatureStatistics(5), FeatureStatistics(5)
    for part in (rows[:10], rows[10:10], rows[10:50], rows[50:]):
        streamed.update(part)
    for part in (rows[:1], rows[1:40], rows[40:]):
        merged.merge(statistics(part))
    merged.merge(FeatureStatistics(5))
    for s in (streamed, merged):
        assert s.count == 97
        np.testing.assert_allclose(s.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(s.covariance, expected, rtol=1e-7 if mean else 1e-11)


def test_float32_features_of_a_large_mean_do_not_cancel():
    rows = (samples(1, 1000, 3) * 1e-3 + 100).astype(np.float32)
    exact = np.cov(rows.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(statistics(rows).covariance, exact, rtol=1e-9)


def test_normal_distributions_with_one_set_of_axes_have_a_closed_form():
    # |m - n|^2 + sum of (s - t)^2, for variances s^2 and t^2 along common axes.
    axes = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    s, t, m, n = np.array([[1, 2, 3, 0.5], [2, 2, 1, 0.1], [0, 0, 1, 5], [1, 0, 0, 5]], float)
    a = FeatureStatistics.from_moments(10, m, axes @ np.diag(s**2) @ axes.T)
    b = FeatureStatistics.from_moments(20, n, axes @ np.diag(t**2) @ axes.T)
    expected = ((m - n) ** 2).sum() + ((s - t) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_it_is_symmetric_and_equals_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = statistics(samples(3, 200, 20)), statistics(samples(4, 300, 20, mean=0.3))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.trace(root).real
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features_are_exact_too():
    # Rank-one covariances v v^T and w w^T: tr((vv^T ww^T)^1/2) = |v . w|.
    v, w = np.random.default_rng(5).normal(size=(2, 64))
    a, b = (FeatureStatistics.from_moments(2, np.zeros(64), np.outer(x, x)) for x in (v, w))
    assert frechet_distance(a, b) == pytest.approx(v @ v + w @ w - 2 * abs(v @ w), rel=1e-12)
    few = statistics(samples(6, 10, 64))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9 * np.trace(few.covariance))


def test_what_is_no_statistics_is_an_error():
    for mean, covariance, words in [
        (np.zeros(2), np.eye(3), "does not fit"),
        (np.array([0.0, np.nan]), np.eye(2), "finite"),
        (np.zeros(2), np.array([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
    ]:
        with pytest.raises(ValueError, match=words):
            FeatureStatistics.from_moments(10, mean, covariance)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(statistics(np.zeros((1, 2))), statistics(np.zeros((3, 2))))
    with pytest.raises(ValueError, match="of 2 and of 3"):
        frechet_distance(statistics(np.zeros((3, 2))), statistics(np.zeros((3, 3))))
    with pytest.raises(ValueError, match="not finite"):
        statistics(np.array([[0.0, np.inf]]))
