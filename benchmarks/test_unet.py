"""One evaluation of a network of CIFAR-10, of 35.7M parameters (cifar10-128) and, on a CPU, of 9M (cifar10-64): ours beside
diffusers, ONNX Runtime and OpenVINO with the same weights. Correct first, then timed in turns.

Under DDIM_FAST_CPU=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 all but ONNX Runtime, which looks at the processor
itself, are held to AVX2.
"""

import pytest
import torch
from measure import CALLS, DEVICE, full, matmul_rate, repeated, run_in_turns
from peers import DTYPES, IMPLEMENTATIONS, PEERS, network, relative_error
from torch.utils.flop_counter import FlopCounterMode

from ddim_fast.diffusion.network import Network

NETWORKS = ["cifar10-128"] if DEVICE == "cuda" else ["cifar10-128", *full("cifar10-64")]
BATCHES = [512, *full(1, 8, 64)] if DEVICE == "cuda" else [8, *full(1)]
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "int8": 1e-1}
T = torch.tensor(500, device=DEVICE)


def _ours(model, implementation, dtype, x):
    """Ours as the sampler runs it, what depends on the timestep alone being done beforehand."""
    ours = Network(model, dtype)
    conditions = ours.conditions(T[None], None, guided=False)
    index = torch.zeros((), dtype=torch.int64, device=DEVICE)
    if dtype == torch.int8:
        ours.quantise(lambda: ours(x, conditions, index)[0])
    if implementation == "eager":
        return lambda x, t: ours(x, conditions, index)[0]
    return torch.compile(lambda x, t: ours(x, conditions, index)[0], fullgraph=True, dynamic=False)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda n: f"batch{n}")
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_unet(benchmark, subtests, name, batch):
    torch.compiler.reset()  # compiles for this batch alone
    model = network(name)
    x = torch.randn(batch, *model.config.image_shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = model(x, T)
    with FlopCounterMode(display=False) as counter:  # of two images: a lone one may be computed twice
        model(torch.zeros(2, *model.config.image_shape, device=DEVICE), T)
    calls = {}
    for name_and_precision in IMPLEMENTATIONS:
        with subtests.test(name_and_precision):
            implementation, precision = name_and_precision.split()
            dtype = DTYPES[precision]
            peer = PEERS.get(implementation)
            evaluate = peer(model, dtype, batch) if peer else _ours(model, implementation, dtype, x)
            assert relative_error(evaluate(x, T), exact) < TOLERANCE[precision]
            calls[name_and_precision] = repeated(lambda evaluate=evaluate: evaluate(x, T))
    benchmark.group = f"{name} batch {batch}"
    rates = run_in_turns(benchmark, calls, evaluations=CALLS * batch)
    benchmark.extra_info["share of matmul"] = {
        key: counter.get_total_flops() / 2 * rate / matmul_rate(DTYPES[key.split()[1]])
        for key, rate in rates.items()
        if not key.endswith("int8")
    }
