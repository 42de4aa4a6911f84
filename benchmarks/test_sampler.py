"""Whole sampling runs, from the same noise to images on the host: ours by each engine, beside diffusers' network in a loop of
its own scheduler, and ONNX Runtime and OpenVINO in a loop of our step. Correct first, then timed in turns.

    pytest benchmarks/test_sampler.py -k "fashion-mnist and batch8 and steps20" --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline "diffusers fp32"
"""

import functools
import itertools

import pytest
import torch
from measure import DEVICE, full, run_in_turns
from peers import DTYPES, IMPLEMENTATIONS, PEERS, diffusers_compiled, network, pipeline, relative_error

from ddim_fast import NoiseSchedule, Sampler, fast_ddim_step, select_timesteps

CASES = [("fashion-mnist", 8), ("fashion-mnist", 1), ("fashion-mnist", 64)]
CASES += [("cifar10-64", 1), ("cifar10-64", 8), ("cifar10-128", 1), ("cifar10-128", 8)]
if DEVICE == "cuda":
    CASES = list(itertools.product(["cifar10-128", "fashion-mnist"], [512, 1, 8, 64]))
STEPS = [10, 20, *full(50, 100)] if DEVICE == "cuda" else [10, *full(20)]
CAPTURED = [name.replace("eager", "captured") for name in IMPLEMENTATIONS if name.startswith("eager ")]
# How torch.compile compiles diffusers' network. On a GPU max-autotune takes minutes for each batch, so it must be asked for:
# --implementations "diffusers-autotuned bf16,captured bf16".
MODES = {"diffusers-compiled": "max-autotune"}
if DEVICE == "cuda":
    MODES = {"diffusers-compiled": "reduce-overhead", "diffusers-autotuned": "max-autotune"}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.2}


@functools.cache
def _peer(implementation, model, dtype, batch):
    """A peer is prepared once for all numbers of steps."""
    if implementation in MODES:
        return diffusers_compiled(model, dtype, batch, mode=MODES[implementation])
    return PEERS[implementation](model, dtype, batch)


@pytest.fixture(scope="module", params=[CASES[0], *full(*CASES[1:])], ids=lambda c: f"{c[0]}-batch{c[1]}")
def case(request):
    """The network's name, the network and the batch size."""
    torch.compiler.reset()  # compiles for this batch alone
    name, batch = request.param
    yield name, network(name), batch
    _peer.cache_clear()


def _diffusers_loop(evaluate, model, steps):
    """What a DDIMPipeline does, without waiting for the GPU to move a timestep there."""
    scheduler = pipeline(model).scheduler
    scheduler.set_timesteps(steps)
    on_device = scheduler.timesteps.to(DEVICE)

    def sample(x):
        for t, t_on_device in zip(scheduler.timesteps, on_device, strict=True):
            x = scheduler.step(evaluate(x, t_on_device), t, x, return_dict=False)[0]
        return x

    return sample


def _step_loop(evaluate, model, steps):
    """Somebody's own loop around our step."""
    schedule = NoiseSchedule.from_config(model.config)
    timesteps = select_timesteps(schedule, steps, "leading")
    levels = [*schedule.alphas_cumprod[timesteps], 1.0]

    def sample(x):
        for t, (before, after) in zip(torch.from_numpy(timesteps).to(DEVICE), itertools.pairwise(levels), strict=True):
            x = fast_ddim_step(x, evaluate(x, t), before, after, prediction_type=model.config.prediction_type)
        return x

    return sample


def _sample(implementation, dtype, model, batch, steps):
    """The function from noise to images."""
    if implementation not in (*PEERS, *MODES):
        sampler = Sampler(model, steps=steps, spacing="leading", engine=implementation, dtype=dtype)
        return lambda x: sampler.sample(x_T=x, batch_size=batch)
    loop = _diffusers_loop if implementation.startswith("diffusers") else _step_loop
    return loop(_peer(implementation, model, dtype, batch), model, steps)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("steps", STEPS, ids=lambda n: f"steps{n}")
@torch.no_grad()
def test_sampler(benchmark, subtests, case, steps, pytestconfig):
    name, model, batch = case
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = _step_loop(model, model, steps)(x)
    calls = {}
    asked = pytestconfig.getoption("--implementations")
    for label in asked.split(",") if asked else [*IMPLEMENTATIONS, *CAPTURED]:
        with subtests.test(label):
            implementation, precision = label.split()
            sample = _sample(implementation, DTYPES[precision], model, batch, steps)
            assert relative_error(sample(x), exact) < TOLERANCE[precision]
            calls[label] = lambda sample=sample: sample(x).cpu()
    benchmark.group = f"{name} batch {batch} steps {steps}"
    rates = run_in_turns(benchmark, calls, evaluations=steps * batch)
    benchmark.extra_info["images/s"] = {name: rate / steps for name, rate in rates.items()}
