"""What Triton would launch on a GPU, compiled on a machine that has none.

A kernel's host function runs as it is, on CPU tensors; where it would launch, Triton compiles for the wanted chip, with the
block sizes and specialisations of this very call, and nothing runs. Triton decides when a kernel is defined whether it
interprets, so this takes a process of its own with TRITON_INTERPRET=0: see :func:`compile_alone`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What a block may have, in bytes (CUDA C++ Programming Guide, table of technical specifications per compute capability).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


class Compiled(NamedTuple):
    """One kernel's machine code.

    Attributes:
        name: of the kernel function.
        ptx: its PTX.
        shared: bytes of shared memory a block takes.
        registers: a thread takes.
        spilled: bytes of stack and local memory a thread takes; not 0 when registers spill.
    """

    name: str
    ptx: str
    shared: int
    registers: int
    spilled: int


class _Driver:
    """Stands in for the GPU's driver: it knows the chip and nothing else."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def instead_of_launching(capability: int, call: Callable[[], Any], do: Callable[..., None]) -> Any:
    """``call()``, in which each launch compiles its kernel for compute capability ``capability`` (80, 90) and calls
    ``do(kernel, arguments by name, grid)``."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def run(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        do(kernel, dict(zip((p.name for p in self.params), arguments, strict=False)) | options, grid)

    launch, JITFunction.run = JITFunction.run, run
    driver.set_active(_Driver(capability))
    try:
        return call()
    finally:
        JITFunction.run = launch


def compile_ahead(capability: int, call: Callable[[], Any]) -> list[Compiled]:
    """Every kernel that ``call`` would launch, compiled for compute capability ``capability``."""
    kernels: list[Any] = []
    instead_of_launching(capability, call, lambda kernel, arguments, grid: kernels.append(kernel))
    unique = {id(kernel): kernel for kernel in kernels}.values()
    return [_inspect(kernel) for kernel in unique]


def _inspect(kernel: Any) -> Compiled:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(kernel.metadata.name, kernel.asm["ptx"], kernel.metadata.shared, registers, stack + local)


def assert_fits(kernel: Compiled, capability: int) -> None:
    """No spills, and no more shared memory than the chip has."""
    assert kernel.spilled == 0, f"{kernel.name} spills {kernel.spilled} bytes a thread (of {kernel.registers} registers)"
    assert kernel.shared <= SHARED_MEMORY[capability], f"{kernel.name} takes {kernel.shared} bytes of shared memory"


def compile_alone(test_file: str, capability: int, *arguments: str) -> None:
    """Runs ``test_file`` as a program, ``test_file CAPABILITY ARGUMENTS``, where Triton compiles instead of interpreting."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    environment.pop("DDIM_FAST_BACKEND", None)
    command = [sys.executable, test_file, str(capability), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
