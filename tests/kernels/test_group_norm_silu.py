"""The machine code of the Triton group_norm_silu, and what it computes. The source is tested with the other implementations, in
tests/ops."""

import itertools
import re
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.helpers.ahead_of_time import assert_fits, compile_ahead, compile_alone
from tests.helpers.ptx_on_cpu import run_ptx


class Case(NamedTuple):
    """A norm of a U-Net of 32 groups.

    Attributes:
        x_channels, skip_channels, side: the sizes of the images.
        layout: "contiguous_format" or "channels_last".
        dtype: of the images.
        numbers: the inputs of one number an image and channel that there are.
        residual: whether there is one.
        kernels: launched forward and backward; the last one backward adds up what the images have.
        access: bytes at a time that the backward pass reads and writes, where a group's rows allow no more.
    """

    x_channels: int
    skip_channels: int
    side: int
    layout: str
    dtype: str
    numbers: tuple[str, ...] = ()
    residual: bool = False
    kernels: tuple[int, int] = (1, 2)
    access: int = 16


TILED = (3, 5)  # the chunks' statistics, merged; backward, sums before the gradient

# Two, four, eight, twelve and sixteen channels a group, at the resolutions of the presets.
CASES = [
    Case(64, 0, 32, "channels_last", "bfloat16", ("pre_shift",)),
    Case(128, 0, 32, "channels_last", "bfloat16"),
    Case(128, 0, 32, "channels_last", "float32", ("pre_shift",)),
    Case(128, 0, 32, "contiguous_format", "bfloat16", ("scale", "shift"), True),
    Case(256, 128, 32, "channels_last", "bfloat16", ("pre_shift",), access=8),
    Case(256, 0, 16, "channels_last", "bfloat16", ("scale", "shift"), True),
    Case(256, 256, 16, "channels_last", "float16"),
    Case(256, 256, 4, "channels_last", "bfloat16"),
    Case(128, 0, 4, "contiguous_format", "float64"),
    Case(128, 0, 64, "channels_last", "bfloat16", ("pre_shift",), kernels=TILED),
    Case(128, 0, 64, "contiguous_format", "bfloat16"),
    Case(128, 128, 256, "channels_last", "bfloat16", kernels=TILED),
    Case(128, 0, 256, "contiguous_format", "float32", ("pre_shift",), kernels=TILED),
]


def check(case: Case, capability: int) -> None:
    from ddim_fast.kernels.group_norm_silu import group_norm_silu
    from ddim_fast.kernels.group_norm_silu_backward import group_norm_silu_backward

    def image(channels):
        values = torch.empty(1, channels, case.side, case.side, dtype=getattr(torch, case.dtype))
        return values.to(memory_format=getattr(torch, case.layout))

    channels = case.x_channels + case.skip_channels
    weight = bias = torch.empty(channels)
    options = {name: torch.empty(1, channels) for name in case.numbers}
    if case.skip_channels:
        options["skip"] = image(case.skip_channels)
    residual = image(channels) if case.residual else None
    arguments = (image(case.x_channels), 32, weight, bias)
    forward = compile_ahead(capability, lambda: group_norm_silu(*arguments, residual=residual, **options))
    backward = compile_ahead(capability, lambda: group_norm_silu_backward(image(channels), *arguments, **options))
    assert (len(forward), len(backward)) == case.kernels, case
    wide = {16: r"(v4\.b32|v2\.b64)", 8: r"v2\.b32"}
    assert_fits(backward[-1], capability)
    for kernels, access in ((forward, 16), (backward[:-1], case.access)):
        for kernel in kernels:
            assert_fits(kernel, capability)
            what = f"{case}: {kernel.name} should"
            assert re.search(rf"ld\.global\.{wide[access]}", kernel.ptx), f"{what} read {access} bytes at a time"
        assert re.search(rf"st\.global\.{wide[access]}", kernels[-1].ptx), f"{what} write {access} bytes at a time"


def check_units(capability: int) -> None:
    """That the widest group of an odd number of channels compiles, and many narrow ones of small images, which share tiles."""
    from ddim_fast.kernels.group_norm_silu import group_norm_silu
    from ddim_fast.kernels.group_norm_tiles import why_not_group

    assert why_not_group(127) is None and why_not_group(129) is not None
    for channels, groups, side in ((127, 1, 4), (1536, 512, 1)):
        x, weight = torch.empty(1, channels, side, side), torch.empty(channels)
        for kernel in compile_ahead(capability, partial(group_norm_silu, x, groups, weight, weight)):
            assert_fits(kernel, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability)


# Channels, channels of the skip, size, groups: groups and their units in one thread, in several lanes, in several warps, and
# not a power of two; whole tiles and parts of them; one tile, and several.
SHAPES = [
    (8, 0, (5, 7), 2),
    (32, 0, (8, 8), 8),
    (96, 0, (4, 4), 1),
    (24, 10, (5, 7), 2),
    (130, 0, (3, 3), 2),
    (128, 64, (8, 8), 32),
    (256, 256, (4, 4), 32),
    (5, 0, (83, 97), 1),
    (16, 0, (48, 48), 8),
]
SMALLER_CHIPS = SHAPES[:4]


def check_numbers(capability: int) -> None:
    """That the compiled kernels give what the definition gives, forward and backward."""
    from ddim_fast.kernels.group_norm_silu import group_norm_silu
    from ddim_fast.kernels.group_norm_silu_backward import group_norm_silu_backward
    from ddim_fast.ops.group_norm_silu import group_norm_silu_reference

    layouts, dtypes = (torch.channels_last, torch.contiguous_format), (torch.float32, torch.bfloat16)
    shapes = SHAPES if capability >= 90 else SMALLER_CHIPS
    for (channels, more, size, groups), layout, dtype in itertools.product(shapes, layouts, dtypes):
        torch.manual_seed(0)
        x, skip, residual, grad = (
            torch.randn(1 if size[0] > 9 else 2, c, *size).to(dtype).to(memory_format=layout) if c else None
            for c in (channels, more, channels + more, channels + more)
        )
        weight, bias, shift = (torch.randn(*n, channels + more) for n in ((), (), (len(x),)))
        options = {"pre_shift": shift, **({} if skip is None else {"skip": skip})}
        arguments = (x, groups, weight, bias)
        out = run_ptx(partial(group_norm_silu, *arguments, residual=residual, **options), capability)
        found = run_ptx(partial(group_norm_silu_backward, grad, *arguments, **options), capability)

        tensors = {"x": x, "weight": weight, "bias": bias} | options
        tensors = {name: t.double().contiguous().requires_grad_() for name, t in tensors.items()}
        exact = group_norm_silu_reference(tensors["x"], groups, *list(tensors.values())[1:3], **dict(list(tensors.items())[3:]))
        gradients = torch.autograd.grad(exact, list(tensors.values()), grad.double())
        pairs = {"out": (out, exact.detach() + residual.double())}
        pairs |= {name: (getattr(found, name), exact) for name, exact in zip(tensors, gradients, strict=True)}
        for name, (actual, expected) in pairs.items():
            error = (actual.double() - expected).abs().max() / expected.abs().max()
            case = f"{name} of {channels} + {more} channels in {groups} groups, {size}, {layout}, {dtype}"
            assert error < 8 * torch.finfo(actual.dtype).eps, f"{case}: {error}"


def check_large_mean(capability: int) -> None:
    """That the compiled kernels, over one tile and several, do not lose the digits that a large mean leaves."""
    from ddim_fast.kernels.group_norm_silu import group_norm_silu
    from ddim_fast.ops.group_norm_silu import group_norm_silu_reference

    for (channels, size, groups), layout in itertools.product(
        [(32, (8, 8), 8), (5, (83, 97), 1), (16, (48, 48), 8)], [torch.channels_last, torch.contiguous_format]
    ):
        torch.manual_seed(0)
        x = (100 + 1e-3 * torch.randn(1, channels, *size)).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, channels)
        exact = group_norm_silu_reference(x.double().contiguous(), groups, weight.double(), bias.double())
        error = (run_ptx(partial(group_norm_silu, x, groups, weight, bias), capability).double() - exact).abs().max()
        assert error <= 8 * torch.finfo(torch.float32).eps * exact.abs().max(), f"{channels}, {size}, {layout}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_compiled_computes_what_is_meant(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability, "numbers")


def test_totals_beyond_32_bits():
    """The 129th image's sums start 2**31 numbers after the first one's."""
    pytest.importorskip("triton")
    from ddim_fast.kernels.group_norm_silu_backward import TOTAL, totals_kernel

    images, channels, (rows, block_c) = 129, 1 << 23, TOTAL
    # One byte a number, and pages that nobody writes take no memory. An offset that wraps around reads zeros before the sums.
    numbers = torch.from_numpy(np.zeros((1 << 31) + 2 * images * channels, np.int8))
    numbers = numbers.cuda() if torch.cuda.is_available() else numbers
    sums = numbers[1 << 31 :].view(images, 2, channels)
    sums[-1, 0, :block_c], sums[-1, 1, :block_c] = 3, 5
    bias_grad, weight_grad = sums.new_zeros(2, block_c)
    totals_kernel[(1,)](sums, bias_grad, weight_grad, images, channels, ROWS=rows, BLOCK_C=block_c)
    assert (bias_grad == 3).all() and (weight_grad == 5).all()


if __name__ == "__main__":
    if "numbers" in sys.argv:
        check_numbers(int(sys.argv[1]))
        check_large_mean(int(sys.argv[1]))
    else:
        for case in CASES:
            check(case, int(sys.argv[1]))
        check_units(int(sys.argv[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norms_of_the_papers_network_read_an_image_once(dtype):
    """Of cifar10-128, in channels_last: a program holds its groups of a whole image in registers."""
    pytest.importorskip("triton")
    from ddim_fast.kernels.group_norm_tiles import FORWARD, choose_geometry

    for channels, side in [(128, 32), (128, 16), (256, 16), (256, 8), (256, 4)]:
        for skip in (0, 128, 256):
            assert choose_geometry(channels, skip, side**2, 32, dtype, True, FORWARD).chunks == 1
