"""The 8-bit convolution by AVX-VNNI, whose instruction is emulated: it has not run on a processor that has it."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ddim_fast.ops import native
from ddim_fast.ops.conv3x3 import conv3x3_components
from tests.helpers.winograd import int8_by_hand

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-mavx2", "-mfma", f"-I{HERE.parents[1] / 'csrc'}"]
STRIPS = {"avx512": 64, "avx2": 16, "baseline": 8}  # output channels whose weights lie together

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.module is None, reason=str(native.why_not)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found"),
]


@pytest.fixture(scope="module")
def convolve(tmp_path_factory):
    if native.module.instruction_set() == "baseline":
        pytest.skip("needs AVX2")
    library = tmp_path_factory.mktemp("avx_vnni") / "conv3x3.so"
    subprocess.run(["g++", *FLAGS, "-x", "c++", HERE / "avx_vnni_on_avx2.h", "-o", library], check=True)
    return ctypes.CDLL(str(library)).conv3x3_avx_vnni


def prepare(weight: torch.Tensor, limits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As native.module.prepare_conv3x3 does it for AVX2, whatever the processor."""
    k, c = weight.shape[:2]
    packed = torch.empty(16, k, c, dtype=torch.int8)
    steps, units, start = 127 / limits, torch.empty(16, k), torch.empty(16, k, dtype=torch.int32)
    scales = [t.data_ptr() for t in (steps, units, start)]
    native.module.prepare_conv3x3(weight.data_ptr(), packed.data_ptr(), k, c, False, 2, scales=scales)
    strip = STRIPS[native.module.instruction_set()]
    strips = [
        block.reshape(16, c // 4, -1, 4)  # four input channels beside each other
        for block in packed.flatten(1).split([c * min(strip, k - first) for first in range(0, k, strip)], dim=1)
    ]
    whole = torch.cat(strips, dim=2)
    return whole.unflatten(2, (k // 16, 16)).transpose(1, 2).contiguous(), steps, units, start


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("n,c,k,h,w", [(2, 16, 16, 8, 8), (3, 32, 48, 7, 5), (1, 64, 80, 1, 1), (2, 48, 192, 3, 10)])
def test_products_are_those_of_rounded_numbers(convolve, n, c, k, h, w, upsample):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(k, c, 3, 3, generator=generator) / (3 * c**0.5), torch.randn(k, generator=generator)
    limits = conv3x3_components(x, upsample=upsample).abs().amax(1).clamp(min=1e-3) * 0.8  # some are cut off
    scale = 2 if upsample else 1
    out = torch.full((n, scale * h, scale * w, k), float("nan"))
    arrays = prepare(weight, limits)
    sizes = (ctypes.c_int64 * 5)(n, h, w, c, k)
    convolve(*addresses(x, arrays[0], bias, out), sizes, int(upsample), *addresses(*arrays[1:]))
    expected = int8_by_hand(x, weight, limits, upsample) + bias[:, None, None]
    error = out.permute(0, 3, 1, 2) - expected
    assert error.square().mean().sqrt() <= 1e-3 * expected.square().mean().sqrt()


def addresses(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]
