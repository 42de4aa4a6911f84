"""Builds csrc/ into the module ddim_fast._native and installs kernels/ as ddim_fast.kernels.

Everything else about the package is in pyproject.toml. Environment variables:

    DDIM_FAST_CUDA         auto (default): compile csrc/*.cu if nvcc is found; 1: fail unless it can be; 0: do not
    CUDA_HOME, CUDA_PATH   where the CUDA toolkit is, when its nvcc is not the one on PATH
    TORCH_CUDA_ARCH_LIST   the GPUs to compile for, in PyTorch's form: "8.0;9.0+PTX", "9.0a"
    CXX                    the C++ compiler

Neither a GPU nor torch is asked for. Where no C++ compiler works, the package installs without the module.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

# Fused multiply-adds would change the last bit of results that are promised to equal plain fp32 arithmetic.
HOST_FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", ",".join(HOST_FLAGS)]

# The instruction sets that csrc/*_kernel.cpp are compiled for, and the flags of GCC and Clang that bring them. No -march: a
# processor is asked for just these before their code is run.
AVX2_FLAGS = ["-mavx2", "-mfma"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {"baseline": []}
# For the kernels that have a use for them.
BF16, INT8 = {}, {}
if IS_X86:
    INSTRUCTION_SETS |= {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    BF16 = {"avx512bf16": [*AVX512_FLAGS, "-mavx512bf16"]}
    INT8 = {"avx512vnni": [*AVX512_FLAGS, "-mavx512vnni"], "avxvnni": [*AVX2_FLAGS, "-mavxvnni"]}
KERNELS = {
    "csrc/conv3x3_kernel.cpp": (INSTRUCTION_SETS | BF16 | INT8, ["-ffp-contract=fast"]),
    "csrc/group_norm_silu_kernel.cpp": (INSTRUCTION_SETS | BF16, ["-ffp-contract=fast"]),
    "csrc/product_kernel.cpp": (INSTRUCTION_SETS | BF16, ["-ffp-contract=fast"]),
    "csrc/attention_kernel.cpp": (INSTRUCTION_SETS, ["-ffp-contract=fast"]),
    "csrc/elementwise_kernel.cpp": (INSTRUCTION_SETS, []),
    "csrc/ddim_step_kernel.cpp": (INSTRUCTION_SETS, []),
}

# Elsewhere compilers come without OpenMP, and the loops run on one thread.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []

# Nothing of the CUDA runtime is exported: torch, in the same process, has a copy of its own.
CUDA_LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]


class CudaBuildError(Exception):
    """The CUDA part cannot be built; the message says why."""


def cuda_mode() -> str:
    mode = os.environ.get("DDIM_FAST_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ddim_fast: DDIM_FAST_CUDA is {mode!r}, but must be auto, 0 or 1")
    return mode


def find_nvcc() -> str | None:
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.path.join(toolkit, "bin") for toolkit in toolkits] + [os.environ.get("PATH", "")]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def gencode_flags(architectures: str) -> list[str]:
    """'8.0;9.0+PTX' -> machine code for both, and PTX of 9.0 for GPUs to come."""
    flags = []
    for architecture in re.split(r"[;\s]+", architectures.strip("; ")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if match is None:
            raise SystemExit(f"ddim_fast: TORCH_CUDA_ARCH_LIST is {architectures!r}, but must be a list such as '8.0;9.0+PTX'")
        major, minor, ptx = match.groups()
        for code in ["sm", "compute"] if ptx else ["sm"]:
            flags += ["-gencode", f"arch=compute_{major}{minor},code={code}_{major}{minor}"]
    return flags


def find_static_cudart(nvcc: str) -> str:
    # nvcc may be a link or a script; only nvcc itself knows where its toolkit is.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    toolkit = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    for folder in ("lib64", "lib", "targets/*/lib"):
        if toolkit and (found := glob(f"{toolkit[1]}/{folder}/libcudart_static.a")):
            return found[0]
    raise CudaBuildError(f"libcudart_static.a was not found in the toolkit of {nvcc}")


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what is built depends on the environment, which timestamps know nothing about

    def build_extension(self, extension: Pybind11Extension) -> None:
        mode = cuda_mode()
        Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # left by an earlier build
        try:
            if mode != "0":
                self.add_cuda(extension)
        except CudaBuildError as error:
            if mode == "1":
                raise SystemExit(f"ddim_fast: DDIM_FAST_CUDA=1, but {error}") from error
            print(f"ddim_fast: building without CUDA: {error}", file=sys.stderr)

        try:
            self.add_kernels(extension)
            super().build_extension(extension)
        except (BaseError, CCompilerError) as error:
            if mode == "1":
                raise SystemExit(f"ddim_fast: DDIM_FAST_CUDA=1, but the C++ compiler failed: {error}") from error
            print(
                "ddim_fast: WARNING: no working C++ compiler, so ddim_fast is installed WITHOUT its native module; "
                f"it runs on PyTorch and Triton instead.\nddim_fast: WARNING: {error}",
                file=sys.stderr,
            )

    def add_kernels(self, extension: Pybind11Extension) -> None:
        """Compiles csrc/*_kernel.cpp once for each instruction set and has the extension link the objects."""
        for source, (instruction_sets, flags) in KERNELS.items():
            for name, its_flags in instruction_sets.items():
                extension.extra_objects += self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, name),
                    macros=[*extension.define_macros, ("DDIM_FAST_ISA", name)],
                    extra_postargs=[*extension.extra_compile_args, *flags, *its_flags],
                    depends=extension.depends,
                )

    def add_cuda(self, extension: Pybind11Extension) -> None:
        """Compiles csrc/*.cu and has the extension link the objects."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise CudaBuildError("nvcc was found neither through CUDA_HOME or CUDA_PATH nor on PATH")
        architectures = gencode_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0 9.0+PTX")
        cudart = find_static_cudart(nvcc)

        os.makedirs(self.build_temp, exist_ok=True)
        objects = []
        for source in sorted(glob("csrc/*.cu")):
            objects.append(os.path.join(self.build_temp, Path(source).name + ".o"))
            command = [nvcc, "-c", source, "-o", objects[-1], *NVCC_FLAGS, *architectures]
            print(*command, flush=True)
            if subprocess.run(command).returncode != 0:
                raise CudaBuildError(f"{nvcc} could not compile {source}")

        extension.define_macros.append(("DDIM_FAST_WITH_CUDA", None))
        extension.extra_objects += [*objects, cudart]
        extension.extra_link_args += CUDA_LINK_FLAGS


native = Pybind11Extension(
    "ddim_fast._native",
    sources=sorted(set(glob("csrc/*.cpp")) - set(KERNELS)),
    depends=sorted(glob("csrc/*.h") + glob("csrc/*.cu")),
    define_macros=[("DDIM_FAST_X86", None)] if IS_X86 else [],
    cxx_std=17,
    extra_compile_args=[*HOST_FLAGS, *OPENMP_FLAGS],
    extra_link_args=OPENMP_FLAGS,
    optional=True,
)

setup(
    # A top-level package named `kernels` would collide with the one on PyPI.
    packages=[*find_packages(include=["ddim_fast", "ddim_fast.*"]), "ddim_fast.kernels"],
    package_dir={"ddim_fast.kernels": "kernels"},
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
