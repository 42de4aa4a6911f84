"""The benchmark of data loading: it measures what it says, and stops where batches are wrong."""

import json

import data_loading
import pytest
import torch


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_measures_all_sizes():
    found = data_loading.measure(count=1100, batch_size=8, threads=1, seconds=0.02)
    assert json.loads(json.dumps(found))["images_per_s"].keys() == {"32x32", "64x64"}
    assert all(rate > 0 for rate in found["images_per_s_per_core"].values())


def test_wrong_batches_are_not_timed(monkeypatch):
    monkeypatch.setattr(data_loading, "to_unit_range", lambda images: images.float())
    with pytest.raises(AssertionError):
        data_loading.measure(count=10, batch_size=8, threads=1, seconds=0.02)
