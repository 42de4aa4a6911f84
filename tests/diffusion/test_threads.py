"""Threads that share a sampler get the images that each would get alone."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ddim_fast import Sampler


@pytest.fixture(autouse=True)
def impatient_threads():
    """Threads take turns a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def in_four_threads(function, requests):
    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(function, requests))


def test_images_are_those_of_their_own_request(small_unet):
    sampler = Sampler(small_unet, steps=2)
    requests = [{"seeds": range(k, k + 1 + k % 3), "labels": k % 10} for k in range(24)]
    for request, images in zip(requests, in_four_threads(lambda r: sampler.sample(**r), requests), strict=True):
        assert torch.equal(images, sampler.sample(**request))


def test_a_compiled_sampler_compiles_once_for_all_threads(fake_network):
    network = fake_network(num_classes=4)
    sampler, eager = Sampler(network, steps=2, engine="compiled"), Sampler(network, steps=2)
    requests = [{"seeds": range(k, k + 1 + k % 2), "labels": k % 4} for k in range(20)]
    for request, images in zip(requests, in_four_threads(lambda r: sampler.sample(**r), requests), strict=True):
        torch.testing.assert_close(images, eager.sample(**request), atol=1e-4, rtol=1e-4)


def test_evaluations_are_those_of_the_threads_own_call(fake_network):
    sampler = Sampler(fake_network(num_classes=4), tolerance=0.05)

    def count(seeds):
        sampler.sample(seeds=seeds, batch_size=2)
        return sampler.evaluations.tolist()

    requests = [range(k, k + 1 + k % 5) for k in range(20)]
    assert in_four_threads(count, requests) == [count(seeds) for seeds in requests]


@pytest.mark.slow
def test_a_compiled_sampler_leaves_other_compiled_functions_alone(fake_network):
    """What a user compiles in another thread meanwhile is compiled, and compiled anew."""
    sampler = Sampler(fake_network(), steps=50, engine="compiled")
    sampler.sample(seeds=[0])
    own = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    enough = threading.Event()

    def sample() -> int:
        runs = 0
        while not enough.is_set():
            sampler.sample(seeds=[runs])
            runs += 1
        return runs

    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(sample)
        try:
            for size in range(1, 7):
                assert torch.equal(own(torch.zeros(size)), torch.ones(size))
        finally:
            enough.set()
        assert sampling.result() > 0
