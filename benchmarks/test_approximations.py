"""What is faster because it is less exact: fewer digits, deep features that several steps share, and fewer steps. Each is
timed in turns with the others, and its images are compared with the solution of the same ordinary differential equation, from
the same noise, so that what costs as much can be weighed against each other.

    pytest benchmarks/test_approximations.py --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline "20 steps fp32"
"""

import pytest
import torch
from measure import DEVICE, full, run_in_turns
from peers import DTYPES, relative_error

from ddim_fast import Sampler, UNet
from ddim_fast.engine import fastest_engine
from ddim_fast.ops import native
from ddim_fast.ops.devices import bf16_is_fast

STEPS = 20
IMAGES = 32 if DEVICE == "cpu" else 512

PRECISIONS = [
    "fp32",
    *(["bf16"] if bf16_is_fast(torch.device(DEVICE)) else []),
    *(["int8"] if DEVICE == "cpu" and native.module is not None and native.module.conv3x3_has_int8() else []),
]


def _runs():
    """By name: options of the sampler."""
    for precision in PRECISIONS:
        yield f"{STEPS} steps {precision}", {"dtype": DTYPES[precision]}
    narrow = {"dtype": DTYPES[PRECISIONS[-1]]}
    for reuse in (2, 3):
        yield f"reuse {reuse} {PRECISIONS[-1]}", {**narrow, "reuse": reuse}
    for steps in (STEPS // 2 + 1, STEPS // 3 + 2):
        yield f"{steps} steps {PRECISIONS[-1]}", {**narrow, "steps": steps}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("solver", ["ddim", *full("dpm-solver++")])
@torch.no_grad()
def test_approximations(benchmark, solver):
    model = UNet.from_pretrained("fashion-mnist").to(DEVICE)
    request = {"seeds": range(IMAGES), "labels": [i % 10 for i in range(IMAGES)], "batch_size": IMAGES}
    # Of second order: what is left of its error is far below that of any run here.
    solution = Sampler(model, steps=100, solver="unipc", spacing="log-snr").sample(**request)
    calls, errors = {}, {}
    for name, options in _runs():
        engine = fastest_engine(torch.device(DEVICE), options.get("dtype", torch.float32))
        options = {"steps": STEPS, "solver": solver, "engine": engine, **options}
        sampler = Sampler(model, **options)
        errors[name] = relative_error(sampler.sample(**request), solution)
        assert errors[name] < 0.5
        calls[name] = lambda sampler=sampler: sampler.sample(**request).cpu()
    benchmark.group = f"{solver}, {IMAGES} images"
    rates = run_in_turns(benchmark, calls, evaluations=STEPS * IMAGES)
    benchmark.extra_info["images/s"] = {name: rate / STEPS for name, rate in rates.items()}
    benchmark.extra_info["error"] = errors
