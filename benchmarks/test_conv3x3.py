"""The 3x3 convolution at the shapes of the CIFAR-10 network on a CPU: ours, in each precision, beside PyTorch's (oneDNN).
Correct first, then timed in turns. Elsewhere PyTorch's is what runs.

    pytest benchmarks/test_conv3x3.py --benchmark-only --benchmark-json run.json
    python benchmarks/report.py run.json --baseline "pytorch fp32"
"""

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, full, run_in_turns
from peers import DTYPES, relative_error

from ddim_fast.ops import native
from ddim_fast.ops.conv3x3 import conv3x3, conv3x3_components, prepare_conv3x3
from ddim_fast.ops.devices import bf16_is_fast

BATCH = 8

# input and output channels, side, enlarged
SHAPES = [
    (128, 128, 32, False),
    (256, 256, 16, False),
    *full((256, 128, 32, False), (512, 256, 16, False), (256, 256, 8, False), (256, 256, 4, False), (256, 256, 16, True)),
]
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 5e-2}
PRECISIONS = ["fp32", *(["bf16"] if bf16_is_fast(torch.device("cpu")) else [])]


def _ours(x, weight, precision, upsample):
    """The prepared convolution, in 8 bits with limits from the images themselves; the other tensors are bfloat16 then."""
    limits = conv3x3_components(x.float(), upsample=upsample).abs().amax(1) if precision == "int8" else None
    prepared = prepare_conv3x3(weight.float(), x.dtype, limits)
    return lambda: conv3x3(x, weight, prepared=prepared, upsample=upsample)


def _pytorch(x, weight, upsample):
    return lambda: F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x, weight, padding=1)


@pytest.mark.skipif(DEVICE != "cpu" or native.module is None, reason="ours is C++ for CPUs")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:3])) + ("-enlarged" if s[3] else ""))
@torch.no_grad()
def test_conv3x3(benchmark, shape):
    torch.manual_seed(0)
    channels, out_channels, side, upsample = shape
    x = torch.randn(BATCH, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, 3, 3) / (3 * channels**0.5)
    exact = _pytorch(x.double(), weight.double(), upsample)()
    calls = {}
    for precision in PRECISIONS:
        layout = torch.channels_last
        narrow = (x.to(DTYPES[precision]), weight.to(DTYPES[precision], memory_format=layout))
        calls[f"pytorch {precision}"] = _pytorch(*narrow, upsample)
        calls[f"ours {precision}"] = _ours(*narrow, precision, upsample)
    if native.module.conv3x3_has_int8():
        calls["ours int8"] = _ours(*narrow, "int8", upsample)
    for name, call in calls.items():
        assert relative_error(call().double(), exact) < TOLERANCE[name.split()[1]]
    benchmark.group = f"conv3x3 batch {BATCH} {channels} -> {out_channels}, {side}x{side}{' enlarged' if upsample else ''}"
    run_in_turns(benchmark, calls, evaluations=BATCH)
