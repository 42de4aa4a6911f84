from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddim_fast.evaluation import measures
from ddim_fast.evaluation.results import Results
from ddim_fast.evaluation.run import EvaluationRun
from ddim_fast.io.processes import Processes


@pytest.fixture
def work(tmp_path):
    return EvaluationRun(Processes(), torch.device("cpu"), Results(tmp_path), {}, batch_size=4, quiet=True)


def trajectory_error(work, name, images, solution):
    """The row of a sampler that makes ``images``."""
    count = len(images)
    sampler = SimpleNamespace(
        sample=lambda seeds, **_: images[list(seeds)],
        evaluations=torch.ones(count, dtype=torch.int64),
        config=SimpleNamespace(num_train_timesteps=1000),
    )
    draws = measures.SampleSet(range(count), None, {"guidance": None})
    measures.measure_trajectories(work, {"model": name}, lambda: sampler, draws, lambda: solution)
    return next(row for row in work.results.rows if row["settings"] == {"model": name})


def test_whitened_errors_count_a_frequency_relative_to_what_the_solution_has_of_it(work):
    """A flat solution with a tenth of it, in amplitude, as a checkerboard: missing one costs as much as missing the other."""
    checkerboard = torch.tensor([1.0, -1.0]).repeat(4)[:, None] * torch.tensor([1.0, -1.0]).repeat(4)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0])[:, None, None, None]
    flat, fine = signs * torch.ones(1, 8, 8), signs * 0.1 * checkerboard[None]
    solution = flat + fine
    nothing = trajectory_error(work, "nothing", torch.zeros_like(solution), solution)
    assert nothing["whitened error"] == pytest.approx(nothing["error"], rel=1e-5)  # the solution keeps its mean square
    assert nothing["error"] == pytest.approx(1.01**0.5, rel=1e-5)
    without_fine = trajectory_error(work, "flat", flat, solution)
    assert without_fine["error"] == pytest.approx(0.1, rel=1e-5)
    assert without_fine["whitened error"] > 5 * without_fine["error"]
    scaled = trajectory_error(work, "scaled", 0.9 * solution, solution)
    assert scaled["whitened error"] == pytest.approx(scaled["error"], rel=1e-5)


def test_the_root_of_a_mean_and_its_standard_error():
    """Against many means of as many numbers each."""
    numbers = np.random.default_rng(0).gamma(3.0, size=(2000, 100)).astype(np.float32)
    found = measures._root_mean("x", numbers[0])
    assert found["x"] == pytest.approx(numbers[0].mean() ** 0.5, rel=1e-6)
    assert found["x standard error"] == pytest.approx((numbers.mean(axis=1) ** 0.5).std(), rel=0.25)
