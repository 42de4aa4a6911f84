"""One evaluation of the 35.7M CIFAR-10 network: ours beside diffusers, ONNX Runtime and OpenVINO with the same weights. Correct
first, then timed in turns."""

import pytest
import torch
from measure import CALLS, DEVICE, matmul_rate, repeated, run_in_turns
from peers import DTYPES, IMPLEMENTATIONS, PEERS, network, relative_error

from ddim_fast.engine import Network

# Multiply-adds of one image: convolutions, linear layers and attention.
GMAC = 6.05
BATCHES = [1, 8, 64, 512] if DEVICE == "cuda" else [1, 8]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "int8": 1e-1}
T = torch.tensor(500, device=DEVICE)


def _ours(implementation, dtype, x):
    """Ours as the sampler runs it, what depends on the timestep alone being done beforehand."""
    ours = Network(network("cifar10-128"), dtype)
    conditions = ours.conditions(T[None], None, guided=False)
    index = torch.zeros((), dtype=torch.int64, device=DEVICE)
    if dtype == torch.int8:
        ours.quantise(lambda: ours(x, conditions, index))
    if implementation == "eager":
        return lambda x, t: ours(x, conditions, index)
    return torch.compile(lambda x, t: ours(x, conditions, index), fullgraph=True, dynamic=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda n: f"batch{n}")
@torch.no_grad()
def test_unet(benchmark, subtests, batch):
    torch.compiler.reset()  # compiles for this batch alone
    model = network("cifar10-128")
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = model(x, T)
    calls = {}
    for name in IMPLEMENTATIONS:
        with subtests.test(name):
            implementation, precision = name.split()
            dtype = DTYPES[precision]
            peer = PEERS.get(implementation)
            evaluate = peer(model, dtype, batch) if peer else _ours(implementation, dtype, x)
            assert relative_error(evaluate(x, T), exact) < TOLERANCE[precision]
            calls[name] = repeated(lambda evaluate=evaluate: evaluate(x, T))
    benchmark.group = f"unet batch {batch}"
    rates = run_in_turns(benchmark, calls, evaluations=CALLS * batch)
    dtypes = {name: DTYPES[name.split()[1]] for name in rates}
    benchmark.extra_info["share of matmul"] = {
        name: 2e9 * GMAC * rate / matmul_rate(dtypes[name]) for name, rate in rates.items() if dtypes[name].is_floating_point
    }
