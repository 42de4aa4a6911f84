import os
import subprocess
import sys

import pytest

from ddim_fast.cli.missing import describe_missing

HIDDEN = "import sys\nsys.modules[{!r}] = None\n"


@pytest.mark.parametrize(
    "module,package,command",
    [
        ("torch", "torch", ["ddim_fast.reconstruct", "photos"]),
        ("torch", "torch", ["ddim_fast.evaluate", "--trajectory-error"]),
        ("torch", "torch", ["ddim_fast", "export", "--to", "diffusers", "--out", "new"]),
        ("tqdm", "tqdm", ["ddim_fast.sample"]),  # imported before any option is read
        pytest.param("tqdm", "tqdm", ["ddim_fast", "restyle", "seven.wav", "--to", "7/theo"], marks=pytest.mark.slow),
        pytest.param(
            "tqdm", "tqdm", ["ddim_fast.train", "--data", "p", "--out", "run", "--device", "cpu"], marks=pytest.mark.slow
        ),
        ("PIL", "pillow", ["ddim_fast.reconstruct", "photos"]),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(module, package, command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN.format(module))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}
    )
    message = f"error: this needs {package}, which is not installed: pip install {package}\n"
    assert (run.returncode, run.stderr) == (1, message)


def test_other_words_of_such_an_error_are_kept():
    assert describe_missing(ModuleNotFoundError("sounds need librosa")) == "sounds need librosa"
    own = ModuleNotFoundError("No module named 'ddim_fast.kernels'", name="ddim_fast.kernels")
    assert describe_missing(own) == "No module named 'ddim_fast.kernels'"
    part = ModuleNotFoundError("No module named 'skimage.metrics'", name="skimage.metrics")
    assert describe_missing(part).endswith("pip install scikit-image")
