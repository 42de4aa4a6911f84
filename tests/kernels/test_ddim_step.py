"""The machine code of the Triton ddim_step, and what it computes. The source is tested with the other implementations, in
tests/ops."""

import sys

import pytest

from tests.helpers.ahead_of_time import assert_fits, compile_ahead, compile_alone
from tests.helpers.ptx_on_cpu import run_ptx

COEFFICIENTS = (1.25, -0.75, 0.3, 1.1, 0.9, 0.43, 0.2)


def check(capability: int) -> None:
    import torch

    from ddim_fast.kernels.ddim_step import TUNING, ddim_step

    def plain_and_everything(images: int, dtype: torch.dtype) -> None:
        sample = torch.empty(images, 3, 32, 32)
        output = sample.to(dtype)
        ddim_step(sample, output, COEFFICIENTS, noise=sample)
        options = {"unconditional": output, "guidance": 2.0, "seeds": torch.zeros(images, dtype=torch.int64)}
        step = torch.zeros((), dtype=torch.int64)
        ddim_step(sample, output, torch.empty(20, 7), 1.0, **options, step=step, out_dtype=dtype)
        ddim_step(sample, output, COEFFICIENTS, 1.0, **options, step=3)

    def every_size() -> None:
        sizes = [int(limit) // 3072 for limit, *_ in TUNING[:-1]]
        for images in (*sizes, sizes[-1] + 1):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                plain_and_everything(images, dtype)

    kernels = compile_ahead(capability, every_size)
    assert len(kernels) >= 3 * (len(TUNING) + 2)
    for kernel in kernels:
        assert_fits(kernel, capability)
        assert "ld.global.v4" in kernel.ptx or "ld.global.L1::evict_last.v4" in kernel.ptx, "accesses should be 16 bytes wide"

    # A fused multiply-add rounds once where the definition rounds twice. (The noise's logarithm is made of them.)
    sample = torch.empty(64, 3, 32, 32)
    for kernel in compile_ahead(capability, lambda: ddim_step(sample, sample, COEFFICIENTS, 1.0, sample, guidance=2.0)):
        assert "fma." not in kernel.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability)


def check_numbers(capability: int) -> None:
    """That the compiled kernel gives the definition's bits, and its own noise to the last digits."""
    import torch

    from ddim_fast.kernels.ddim_step import ddim_step
    from ddim_fast.ops.ddim_step import ddim_step_reference

    torch.manual_seed(0)
    sample, output, unconditional, noise = torch.randn(4, 3, 3, 9, 7)
    seeds, step = torch.tensor([0, 7, 2**62 + 1]), torch.tensor(1)
    coefficients = torch.tensor([[0.0] * 7, COEFFICIENTS])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        images = [t.to(dtype) for t in (sample, output)]
        guided = {"unconditional": unconditional.to(dtype), "guidance": 2.0}
        for options in ({}, {"noise": noise.to(dtype)}, guided, {"seeds": seeds}, {**guided, "seeds": seeds}):
            rest = {name: options[name] for name in options if name != "noise"}
            arguments = (*images, coefficients, 1.0, options.get("noise"))
            actual = run_ptx(lambda a=arguments, r=rest: ddim_step(*a, **r, step=step), capability)
            expected = ddim_step_reference(*arguments, **rest, step=step)
            tolerance = torch.finfo(dtype).eps if "seeds" in options else 0
            torch.testing.assert_close(actual, expected, atol=4 * tolerance, rtol=tolerance, msg=f"{dtype}, {list(options)}")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_what_is_compiled_computes_what_is_meant(capability):
    pytest.importorskip("triton")
    compile_alone(__file__, capability, "numbers")


if __name__ == "__main__":
    (check_numbers if "numbers" in sys.argv else check)(int(sys.argv[1]))
