"""The DDIM step on a CIFAR-10 batch: each implementation beside diffusers' scheduler. Correct first, then timed."""

import pytest
import torch

from ddim_fast import NoiseSchedule, fast_ddim_step
from ddim_fast.ops import native

BATCH, T, PREV = 128, 500, 450
LEVELS = [float(a) for a in NoiseSchedule.linear().alphas_cumprod[[T, PREV]]]


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(BATCH, 3, 32, 32, generator=generator) for _ in range(2))


def _expected(sample, output):
    a, b = LEVELS
    x, eps = sample.double(), output.double()
    return (b / a) ** 0.5 * (x - (1 - a) ** 0.5 * eps) + (1 - b) ** 0.5 * eps


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_fast_ddim_step(benchmark, batch, backend, monkeypatch):
    if backend == "native" and native.module is None:
        pytest.skip(native.why_not)
    monkeypatch.setenv("DDIM_FAST_BACKEND", backend)
    torch.testing.assert_close(fast_ddim_step(*batch, *LEVELS).double(), _expected(*batch), atol=1e-5, rtol=1e-5)
    benchmark(fast_ddim_step, *batch, *LEVELS)


def test_diffusers_scheduler(benchmark, batch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    sample, output = batch
    step = lambda: scheduler.step(output, T, sample, return_dict=False)[0]  # noqa: E731
    torch.testing.assert_close(step().double(), _expected(*batch), atol=1e-5, rtol=1e-5)
    benchmark(step)
