"""The DDIM step on CIFAR-10 batches: each implementation beside plain PyTorch, torch.compile and diffusers' scheduler. Correct
first, then timed. The largest batch is beyond the caches, where a step can go no faster than a copy."""

import pytest
import torch
from measure import DEVICE, full, run

from ddim_fast import NoiseSchedule, ddim_step, fast_ddim_step
from ddim_fast.diffusion.step import step_coefficients
from ddim_fast.ops import native

T, PREV = 500, 450
A, B = (float(a) for a in NoiseSchedule.linear().alphas_cumprod[[T, PREV]])
BATCHES = [64, 512, *full(1, 16384)] if DEVICE == "cuda" else [64, *full(1, 2048)]
OURS = ["reference", "triton", "cuda"] if DEVICE == "cuda" else ["reference", "native"]


@pytest.fixture(params=BATCHES, ids=lambda n: f"batch{n}")
def inputs(request):
    """The sample, and the outputs with and without a condition."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return tuple(torch.randn(request.param, 3, 32, 32, generator=generator, device=DEVICE) for _ in range(3))


@pytest.fixture
def backend(request, monkeypatch):
    if request.param in ("native", "cuda") and native.module is None:
        pytest.skip(native.why_not)
    monkeypatch.setenv("DDIM_FAST_BACKEND", request.param)
    return request.param


def _formula(sample, output):
    return (B / A) ** 0.5 * (sample - (1 - A) ** 0.5 * output) + (1 - B) ** 0.5 * output


def _check_and_time(benchmark, step, sample, output, moved):
    benchmark.group = f"ddim_step batch {len(sample)}"
    torch.testing.assert_close(step().double(), _formula(sample.double(), output.double()), atol=1e-5, rtol=1e-5)
    run(benchmark, step, torch.float32, moved=moved * sample.numel() * sample.element_size())


@pytest.mark.parametrize("backend", OURS, indirect=True)
def test_fast_ddim_step(benchmark, inputs, backend):
    sample, output, _ = inputs
    _check_and_time(benchmark, lambda: fast_ddim_step(sample, output, A, B), sample, output, 3)


@pytest.mark.parametrize("backend", OURS, indirect=True)
def test_fast_ddim_step_guided_clipped_and_stochastic(benchmark, inputs, backend):
    """Guidance, clipping and noise from seeds, in the pass that is made anyway."""
    sample, output, unconditional = inputs
    seeds = torch.arange(len(sample), device=DEVICE)
    coefficients = step_coefficients(A, B, 1.0)

    def step():
        return ddim_step(sample, output, coefficients, 1.0, unconditional=unconditional, guidance=2.0, seeds=seeds, step=3)

    benchmark.group = f"everything batch {len(sample)}"
    expected = step()
    assert expected.isfinite().all() and torch.equal(step(), expected)
    run(benchmark, step, torch.float32, moved=4 * sample.numel() * 4)


def test_compiled_formula(benchmark, inputs):
    sample, output, _ = inputs
    torch.compiler.reset()
    compiled = torch.compile(_formula, fullgraph=True)
    _check_and_time(benchmark, lambda: compiled(sample, output), sample, output, 3)


def test_diffusers_scheduler(benchmark, inputs):
    diffusers = pytest.importorskip("diffusers")
    if DEVICE == "cuda":
        pytest.skip("its step reads the timestep back from the GPU, so no graph can hold it")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(20)
    sample, output, _ = inputs
    _check_and_time(benchmark, lambda: scheduler.step(output, T, sample, return_dict=False)[0], sample, output, 3)
