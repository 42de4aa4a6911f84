"""The module of csrc/ with its CUDA functions, on a GPU and, compiled as C++ against cuda_on_cpu.h, without one.

On a machine with a GPU, NVIDIA's tools look at the real kernels; each run should end with "0 errors":

    for tool in memcheck racecheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool python -m pytest -m gpu tests/csrc
    done
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from ddim_fast.ops import native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DEVICE_HEADERS = ("cuda_bf16.h", "cuda_fp16.h", "cuda_pipeline.h")  # what they define is in cuda_on_cpu.h
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"]  # unaligned accesses above all
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-w",
    "-DDDIM_FAST_WITH_CUDA",
]


def _key() -> str:
    """Changes with whatever the emulated module is made from."""
    digest = hashlib.sha256(f"{FLAGS} {sys.version} {sys.platform}".encode())
    for path in sorted([*CSRC.iterdir(), *HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(library: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    include = [f"-I{CSRC}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name in DEVICE_HEADERS:
            Path(folder, name).touch()

        def compile_one(source: Path) -> str:
            is_device = source.suffix == ".cu"
            kernel = ["-DDDIM_FAST_ISA=baseline"] if source.stem.endswith("_kernel") else []
            device = ["-x", "c++", f"-I{folder}", "-include", HERE / "cuda_on_cpu.h", "-O1", *SANITIZE]
            language = device if is_device else ["-O0"]
            target = f"{folder}/{source.name}.o"
            _run(["g++", "-c", *FLAGS, *include, *language, *kernel, source, "-o", target])
            return target

        sources = [*CSRC.glob("*.cu"), *CSRC.glob("*.cpp"), *HERE.glob("*.cpp")]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        _run(["g++", "-shared", *objects, "-o", f"{folder}/_native.so"])
        Path(folder, "_native.so").rename(library)


def _run(command: list) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Cuda(NamedTuple):
    """Where the CUDA functions run.

    Attributes:
        module: ddim_fast._native, or its emulation.
        device: of the tensors it takes.
        set_emulation: set_emulation(multiprocessors, bytes of shared memory a block may have, backwards); None on a GPU.
    """

    module: ModuleType
    device: str
    set_emulation: Callable[[int, int, bool], None] | None

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0


@pytest.fixture(scope="session")
def emulated_library(pytestconfig) -> Path:
    """The emulated module's file, built once for each state of the sources."""
    library = Path(pytestconfig.cache.mkdir("cuda_on_cpu")) / _key() / "_native.so"
    if not library.exists():
        _build(library)
    return library


@pytest.fixture(scope="session")
def emulated_module(emulated_library) -> ModuleType:
    specification = importlib.util.spec_from_file_location("_native", emulated_library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def gpu() -> Cuda:
    """The CUDA functions on a GPU."""
    if not native.has_cuda:
        pytest.skip(native.why_not or "ddim_fast._native was built without CUDA")
    return Cuda(native.module, "cuda", None)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request) -> Cuda:
    """The CUDA functions, emulated and on a GPU."""
    if request.param == "gpu":
        return request.getfixturevalue("gpu")
    module = request.getfixturevalue("emulated_module")
    set_emulation = ctypes.CDLL(str(request.getfixturevalue("emulated_library"))).cuda_on_cpu_set
    set_emulation(132, 227 << 10, False)
    return Cuda(module, "cpu", set_emulation)
