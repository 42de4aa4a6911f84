"""The machine code of the Triton add_bias, and what it computes. The source is tested in tests/ops."""

import sys

import pytest
import torch

from tests.helpers.ahead_of_time import assert_fits, compile_ahead, compile_alone
from tests.helpers.ptx_on_cpu import run_ptx

# Channels and side of the networks' images; 384 channels are cut into three pieces.
SIZES = [(128, 32), (256, 4), (384, 16)]


def images(channels: int, side: int, dtype: torch.dtype, layout: torch.memory_format, n: int = 2):
    image, residual = (torch.randn(n, channels, side, side).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    return image, torch.randn(channels).to(dtype), torch.randn(n, channels), residual


def check(capability: int) -> None:
    from ddim_fast.kernels.add_bias import add_bias

    for channels, side in SIZES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.channels_last, torch.contiguous_format):
                image, bias, shift, residual = images(channels, side, dtype, layout)
                for terms in ((bias, None, residual), (bias, shift, residual), (bias, None, None)):
                    (kernel,) = compile_ahead(capability, lambda i=image, t=terms: add_bias(i, *t, out=i))
                    assert_fits(kernel, capability)
                    case = f"{channels} channels, {side}, {dtype}, {layout}"
                    # Of the image and of the residual, and none that is narrower.
                    assert "ld.global.v4.b32" in kernel.ptx and "st.global.v4.b32" in kernel.ptx, case
                    assert "st.global.b" not in kernel.ptx and "st.global.v2" not in kernel.ptx, case
    image, bias, shift, residual = images(3, 32, torch.bfloat16, torch.channels_last)  # the network's last convolution
    for kernel in compile_ahead(capability, lambda: add_bias(image, bias, shift, residual)):
        assert_fits(kernel, capability)


def check_numbers(capability: int) -> None:
    """That the compiled kernel gives what the definition gives, to the last bit: the sums are in a fixed order."""
    from ddim_fast.kernels.add_bias import add_bias

    torch.manual_seed(0)
    for channels, side in ((128, 5), (96, 3), (3, 7), (300, 2)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for layout in (torch.channels_last, torch.contiguous_format):
                image, bias, shift, residual = images(channels, side, dtype, layout, n=3)
                exact = image.float() + bias.float()[:, None, None] + shift[:, :, None, None] + residual.float()
                out = run_ptx(lambda a=(image, bias, shift, residual): add_bias(*a), capability)
                assert torch.equal(out, exact.to(dtype)), f"{channels} channels, {side}, {dtype}, {layout}"
                exact = image.float() + bias.float()[:, None, None] + residual.float()
                run_ptx(lambda i=image, b=bias, r=residual: add_bias(i, b, None, r, out=i), capability)
                assert torch.equal(image, exact.to(dtype)), f"{channels} channels, {side}, {dtype}, {layout}, in place"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_compiled_computes_what_is_meant(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability, "numbers")


if __name__ == "__main__":
    (check_numbers if "numbers" in sys.argv else check)(int(sys.argv[1]))
