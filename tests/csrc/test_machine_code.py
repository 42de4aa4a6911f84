"""What nvcc makes of csrc/*.cu, on a machine that needs no GPU: no spills, and accesses of 16 bytes."""

import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ("ddim_step", "group_norm_silu")
CAPABILITIES = (80, 90)
FLAGS = ["-O3", "-std=c++17", "-fmad=false"]  # as setup.py has them

TOOLKITS = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
NVCC = shutil.which("nvcc", path=os.pathsep.join([*TOOLKITS, os.environ.get("PATH", "")]))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="nvcc was not found")]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], tuple[str, str]]:
    """Of each source and compute capability, the PTX and what ptxas says about it."""

    def compile_one(source: str, capability: int) -> tuple[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            command = [NVCC, "-cubin", *FLAGS, f"-arch=sm_{capability}", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
            target = ["-o", f"{folder}/{source}.out", CSRC / f"{source}.cu"]
            result = subprocess.run([*command, *target], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            return Path(folder, f"{source}.ptx").read_text(), result.stderr

    keys = [(source, capability) for source in SOURCES for capability in CAPABILITIES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(lambda key: compile_one(*key), keys), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", SOURCES)
def test_registers_do_not_spill(compiled, source, capability):
    _, usage = compiled[source, capability]
    kernels = re.findall(r"Compiling entry function '(\w+)'", usage)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    assert len(frames) >= len(kernels) == {"ddim_step": 3, "group_norm_silu": 12}[source]
    assert set(frames) == {("0", "0", "0")}, usage
    assert "warning" not in usage


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ddim_step_moves_16_bytes(compiled, capability):
    ptx, _ = compiled["ddim_step", capability]
    assert "ld.global.v4.u32" in ptx and "st.global.wb.v4.u32" in ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_group_norm_silu_moves_16_bytes(compiled, capability):
    ptx, _ = compiled["group_norm_silu", capability]
    for kernel in re.split(r"\.entry ", ptx)[1:]:
        name = kernel.split("(")[0]
        if "Li1E" in name:  # one value at a time
            continue
        assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], \[.*\], 16", kernel), name
        assert "st.global.wb.v4" in kernel and "ld.shared.v4" in kernel and "ld.global.v4" in kernel, name
        assert not re.search(r"(ld|st)\.local|(ld|st)\.shared\.u(8|16)|st\.global\.wb\.u", kernel), name
