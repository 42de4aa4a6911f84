"""What setup.py builds, with and without compilers: wheels are made from a copy of the tree, as pip makes them."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ddim_fast

pytestmark = pytest.mark.slow  # builds wheels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "csrc", "kernels", "ddim_fast"]
SETTINGS = ["DDIM_FAST_CUDA", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "CC", "CXX"]

NVCC = next((shutil.which("nvcc", path=f"{os.environ[n]}/bin") for n in SETTINGS[1:3] if n in os.environ), None)
NVCC = NVCC or shutil.which("nvcc")


@pytest.fixture
def build(tmp_path):
    """Runs `pip wheel` with the given environment variables; returns the process and the wheel's path or None."""
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for path in (ROOT / name for name in SOURCES):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=ignore)
        elif path.exists():
            shutil.copy(path, source)

    def run(**settings):
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
        command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
        process = subprocess.run(
            [*command, "--wheel-dir", tmp_path, source],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return process, next(tmp_path.glob("*.whl"), None)

    return run


def install(wheel: Path, folder: Path) -> dict[str, str]:
    """Unpacks a wheel and returns what ddim_fast.ops.native says there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # Without site-packages: an editable installation would lend its native module to a wheel that has none.
    code = "from ddim_fast.ops.native import *; print(module is not None, has_cuda, why_not, sep='|')"
    command = [sys.executable, "-S", "-c", code]
    output = subprocess.check_output(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, text=True)
    return dict(zip(["built", "has_cuda", "why_not"], output.strip().split("|"), strict=True))


def test_a_wheel_without_cuda(build, tmp_path):
    process, wheel = build(DDIM_FAST_CUDA="0")
    assert process.returncode == 0, process.stdout
    assert install(wheel, tmp_path / "site") == {"built": "True", "has_cuda": "False", "why_not": "None"}

    names = zipfile.ZipFile(wheel).namelist()
    assert "ddim_fast/kernels/ddim_step.py" in names
    assert "ddim_fast/ops/native.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"ddim_fast", f"ddim_fast-{ddim_fast.__version__}.dist-info"}, (
        "csrc, kernels or tests were installed at the top level"
    )
    packaged = [path for path in (ROOT / "ddim_fast/models").glob("packaged/**/*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in packaged} <= set(names)


def test_a_wheel_without_a_compiler(build, tmp_path):
    process, wheel = build(DDIM_FAST_CUDA="0", CC="/bin/false", CXX="/bin/false")
    assert process.returncode == 0, process.stdout
    assert "WARNING: no working C++ compiler" in process.stdout
    installed = install(wheel, tmp_path / "site")
    assert installed["built"] == "False"
    assert "no C++ compiler worked" in installed["why_not"]


def test_cuda_on_demand_needs_nvcc(build):
    process, wheel = build(DDIM_FAST_CUDA="1", PATH="")
    assert process.returncode != 0 and wheel is None
    assert "DDIM_FAST_CUDA=1, but nvcc was found neither through CUDA_HOME or CUDA_PATH nor on PATH" in process.stdout


def test_an_unknown_cuda_mode_is_an_error(build):
    process, wheel = build(DDIM_FAST_CUDA="maybe")
    assert process.returncode != 0 and wheel is None
    assert "DDIM_FAST_CUDA is 'maybe', but must be auto, 0 or 1" in process.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_an_unknown_architecture_is_an_error(build):
    process, wheel = build(CUDA_HOME=str(Path(NVCC).parent.parent), TORCH_CUDA_ARCH_LIST="8.0;Hopper")
    assert process.returncode != 0 and wheel is None
    assert "TORCH_CUDA_ARCH_LIST is '8.0;Hopper', but must be a list such as" in process.stdout


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_wheel_with_cuda(build, tmp_path):
    process, wheel = build(CUDA_HOME=str(Path(NVCC).parent.parent), TORCH_CUDA_ARCH_LIST="9.0")
    assert process.returncode == 0, process.stdout
    assert "arch=compute_90,code=sm_90" in process.stdout
    assert install(wheel, tmp_path / "site") == {"built": "True", "has_cuda": "True", "why_not": "None"}


def test_nvcc_that_fails_leaves_a_wheel_for_the_cpu(build, tmp_path):
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    process, wheel = build(CUDA_HOME=str(tmp_path / "cuda"))
    assert process.returncode == 0, process.stdout
    assert "building without CUDA" in process.stdout
    assert install(wheel, tmp_path / "site") == {"built": "True", "has_cuda": "False", "why_not": "None"}
