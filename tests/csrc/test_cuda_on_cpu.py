"""What the emulation is for: it finds the mistakes that a GPU may forgive, or answer with anything at all."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles

# Each kernel adds up the squares of the thread numbers in shared memory; 0 is right and the others are not.
SOURCE = r"""
#include "cuda_on_cpu.h"

extern "C" __attribute__((visibility("default"))) const char* run(int mistake, bool backwards, float* out) try {
    cuda_on_cpu::backwards = backwards;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2), config.blockDim = dim3(64), config.dynamicSmemBytes = 64 * sizeof(float);
    void (*kernel)(int, float*) = [](int mistake, float* out) {
        float* shared = reinterpret_cast<float*>(ddim_fast::shared_memory);
        const int i = threadIdx.x;
        const float square = i * i;
        if (mistake == 5) __pipeline_memcpy_async(&shared[i], &square, sizeof square);
        else shared[mistake == 4 ? i + 1 : i] = square;
        if (mistake != 1 && (mistake != 2 || i < 40)) __syncthreads();
        float total = shared[i] + shared[63 - i];
        for (int d = 16; d > 0; d /= 2) total += mistake == 3 && i == 7 ? 0 : __shfl_xor_sync(-1, total, d);
        if (mistake == 6) __pipeline_memcpy_async(reinterpret_cast<char*>(shared) + 2, out, sizeof(float));
        if (i == 0) out[blockIdx.x] = total;
    };
    return cudaLaunchKernelEx(&config, kernel, mistake, out) == cudaSuccess ? nullptr : "invalid launch";
} catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "kernels.cpp").write_text(SOURCE)
    command = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{Path(__file__).parent}",
        "kernels.cpp",
        "-o",
        "kernels.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    library.run.restype = ctypes.c_char_p

    def call(mistake: int, backwards: bool = False) -> tuple[list[float], str]:
        out = (ctypes.c_float * 2)()
        error = library.run(mistake, ctypes.c_bool(backwards), out)
        return list(out), (error or b"").decode()

    return call


RIGHT = float(sum(i * i for i in range(32)) + sum(i * i for i in range(32, 64)))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_right_kernel(run, backwards):
    assert run(0, backwards) == ([RIGHT, RIGHT], "")


def test_a_missing_barrier_makes_a_difference(run):
    assert any(out != [RIGHT, RIGHT] for out, _ in (run(1), run(1, backwards=True)))


def test_threads_at_different_barriers(run):
    assert "threads wait at different barriers" in run(2)[1]
    assert "threads wait at different barriers" in run(3)[1]


def test_a_write_past_shared_memory(run):
    assert run(4)[1] == "a block wrote past its shared memory"


def test_an_asynchronous_copy_that_nobody_waits_for(run):
    out, _ = run(5)
    assert out != [RIGHT, RIGHT]


def test_an_unaligned_asynchronous_copy(run):
    assert run(6)[1] == "an asynchronous copy is not aligned"
