"""The Triton ddim_step: its numbers under the interpreter on the CPU, its machine code by compiling ahead of time.

Triton decides between the two when a kernel is defined, from TRITON_INTERPRET. So each check runs in a process of its
own, as `python test_ddim_step_triton.py CHECK ARGUMENT`, whatever this one has imported.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

COEFFICIENTS = (1.25, -0.75, 0.3, 1.1, 0.9, 0.43, 0.2)


def reference(sample, model_output, clip=None, noise=None):
    import torch

    sample, model_output = sample.float(), model_output.float()
    p, q, r, s, u, v, sigma = torch.tensor(COEFFICIENTS).to(sample.device)
    x0 = p * sample + q * model_output
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    out = u * x0 + v * (r * sample + s * model_output)
    return out if noise is None else out + sigma * noise.float()


def check_numbers(device: str) -> None:
    import torch

    from ddim_fast.kernels.ddim_step import ddim_step

    # The interpreter cuts fp32 off where bf16 ends; GPUs round. There alone the last bit of a bf16 may differ.
    last_bit = torch.finfo(torch.bfloat16).eps if device == "cpu" else 0

    torch.manual_seed(0)
    for shape in [(0, 3), (1,), (15,), (1000,), (2, 3, 17, 19)]:
        for dtype in [torch.float32, torch.bfloat16, torch.float16]:
            for clip in [None, 1.0]:
                sample, model_output, noise = torch.randn(3, *shape).to(device, dtype)
                for z in [None, noise]:
                    expected = reference(sample, model_output, clip, z).to(dtype)
                    actual = ddim_step(sample, model_output, COEFFICIENTS, clip, z)
                    rtol = last_bit if dtype == torch.bfloat16 else 0
                    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)

    # out may be any of the inputs
    inputs = torch.randn(3, 1000, device=device)
    expected = reference(inputs[0], inputs[1], 1.0, inputs[2])
    for which in range(3):
        sample, model_output, noise = tensors = list(inputs.clone())
        assert ddim_step(sample, model_output, COEFFICIENTS, 1.0, noise, out=tensors[which]) is tensors[which]
        torch.testing.assert_close(tensors[which], expected, rtol=0, atol=0)

    # the state in fp32, the network in bf16, any order of dimensions
    sample = torch.randn(2, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    model_output = torch.randn_like(sample).bfloat16()
    out = ddim_step(sample, model_output, COEFFICIENTS)
    assert out.stride() == sample.stride() and out.dtype == torch.float32
    torch.testing.assert_close(out, reference(sample, model_output), rtol=0, atol=0)

    # one channel: contiguous and channels_last are the same memory
    image = torch.randn(2, 1, 8, 8, device=device)
    ddim_step(image, image.as_strided(image.shape, (64, 1, 8, 1)), COEFFICIENTS)

    sample = torch.randn(100, device=device)
    sample[[0, 42]] = float("nan")
    out = ddim_step(sample, sample.nan_to_num(), COEFFICIENTS, clip=1.0)
    assert out.isnan().nonzero().flatten().tolist() == [0, 42]

    x = torch.randn(4, 6, device=device)
    for message, call in {
        "6 values instead of 7": lambda: ddim_step(x, x, COEFFICIENTS[:6]),
        "clip is 0": lambda: ddim_step(x, x, COEFFICIENTS, clip=0),
        "sample must be dense": lambda: ddim_step(x[:, ::2], x[:, ::2], COEFFICIENTS),
        "model_output is torch.float64": lambda: ddim_step(x, x.double(), COEFFICIENTS),
        "noise has shape": lambda: ddim_step(x, x, COEFFICIENTS, noise=x[:2]),
        "out has strides": lambda: ddim_step(x, x, COEFFICIENTS, out=torch.empty(6, 4, device=device).T),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def check_machine_code(capability: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ddim_fast.kernels.ddim_step import TUNING, ddim_step_kernel

    def kind(name):
        if name.isupper():
            return "constexpr"
        return {"numel": "i32"}.get(name, "*fp32" if name.endswith("_ptr") else "fp32")

    signature = {name: kind(name) for name in ddim_step_kernel.arg_names}
    # As a launch specialises them: torch aligns tensors to 16 bytes, and the size of images is a multiple of 16.
    multiples = [i for i, name in enumerate(signature) if name.endswith("_ptr") or name == "numel"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in multiples}
    for _, block, num_warps in TUNING:
        source = ASTSource(ddim_step_kernel, signature, {"HAS_NOISE": True, "BLOCK": block}, attributes)
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, GPUTarget("cuda", int(capability), 32), options)

        assert compiled.metadata.shared == 0
        assert "fma." not in compiled.asm["ptx"], "a fused multiply-add rounds once where the definition rounds twice"
        assert "ld.global.v4" in compiled.asm["ptx"], "accesses should be 16 bytes wide"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "STACK:0 " in usage and "LOCAL:0 " in usage, f"registers spill: {usage}"


def run_alone(check: str, argument: str, interpret: bool) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, __file__, check, argument]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def needs_triton():
    pytest.importorskip("triton")


def test_numbers_under_the_interpreter():
    run_alone("numbers", "cpu", interpret=True)


@pytest.mark.gpu
def test_numbers_on_the_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    run_alone("numbers", "cuda", interpret=False)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_machine_code(capability):
    run_alone("machine_code", capability, interpret=False)


if __name__ == "__main__":
    check, argument = sys.argv[1:]
    {"numbers": check_numbers, "machine_code": check_machine_code}[check](argument)
