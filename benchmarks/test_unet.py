"""One evaluation of the 35.7M CIFAR-10 network: ours, eager and compiled, in float32 and bfloat16, beside diffusers'
UNet2DModel with the same weights. Correct first, then timed."""

import functools

import pytest
import torch
from measure import DEVICE, run

from ddim_fast import UNet, UNetConfig
from ddim_fast.engine import Network

# Multiply-adds of one image: convolutions, linear layers and attention.
GMAC = 6.05
BATCHES = [1, 64, 512] if DEVICE == "cuda" else [1, 8]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = torch.tensor(500, device=DEVICE)


@functools.cache
def _ours():
    torch.manual_seed(0)
    model = UNet(UNetConfig.preset("cifar10-128")).eval()
    for p in model.parameters():
        if not p.any():  # the zeros of a fresh network would cost as much and prove nothing
            torch.nn.init.normal_(p, std=0.02)
    return model.to(DEVICE, memory_format=torch.channels_last)


def _diffusers(dtype):
    diffusers = pytest.importorskip("diffusers")
    config = _ours().config
    levels = range(len(config.channel_multipliers))
    down = tuple("AttnDownBlock2D" if i == 1 else "DownBlock2D" for i in levels)
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=tuple(config.base_channels * m for m in config.channel_multipliers),
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=None,
        norm_eps=config.norm_eps,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    model.load_state_dict(_ours().state_dict())
    layout = torch.contiguous_format if dtype == torch.float32 and DEVICE == "cpu" else torch.channels_last  # the faster
    model = model.eval().to(DEVICE, dtype, memory_format=layout)
    return lambda x: model(x.to(dtype).contiguous(memory_format=layout), T, return_dict=False)[0].float()


def _prepared(dtype):
    """Ours as the sampler runs it, what depends on the timestep alone being done beforehand."""
    network = Network(_ours(), dtype)
    conditions = network.conditions(T[None], None, guided=False)
    index = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return lambda x: network(x, conditions, index)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["diffusers", "diffusers-compiled", "eager", "compiled"])
def test_unet(benchmark, batch, dtype, implementation):
    torch.manual_seed(1)
    x = torch.randn(batch, 3, 32, 32, device=DEVICE)
    torch.compiler.reset()
    if implementation.startswith("diffusers"):
        evaluate = _diffusers(DTYPES[dtype])
        if implementation == "diffusers-compiled":
            evaluate = torch.compile(evaluate, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    else:
        evaluate = _prepared(DTYPES[dtype])
        if implementation == "compiled":
            mode = "max-autotune-no-cudagraphs" if DEVICE == "cuda" else None
            evaluate = torch.compile(evaluate, mode=mode, fullgraph=True, dynamic=False)
    benchmark.group = f"unet {dtype} batch {batch}"
    with torch.no_grad():
        exact = _ours()(x, T)
        error = (evaluate(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < (1e-4 if dtype == "fp32" else 3e-2)
        run(benchmark, lambda: evaluate(x), DTYPES[dtype], moved=0, operations=round(2e9 * GMAC * batch))
