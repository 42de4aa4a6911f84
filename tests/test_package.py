"""What importing the package promises."""

import importlib.util
import subprocess
import sys

import pytest

import ddim_fast

_BLOCK_TORCH = "import sys; sys.modules['torch'] = None; sys.modules['triton'] = None; "


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_torch_nor_triton():
    code = "import sys, ddim_fast; dir(ddim_fast); print([m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    assert _python(code) == "[]\n"


def test_schedules_and_timesteps_work_without_torch():
    code = "import ddim_fast as d; print(d.select_timesteps(d.NoiseSchedule.linear(1e-4, 0.02, 1000), 4, 'quadratic').tolist())"
    assert _python(_BLOCK_TORCH + code) == "[999, 444, 111, 0]\n"


@pytest.mark.parametrize("name", ddim_fast.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert name in dir(ddim_fast)
    assert getattr(ddim_fast, name).__doc__


def test_a_name_of_its_own_module_is_the_same_object():
    from ddim_fast.diffusion.sampler import Sampler

    assert ddim_fast.Sampler is Sampler and ddim_fast.__all__ == sorted(ddim_fast.__all__) and len(ddim_fast.__all__) >= 17


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = ddim_fast.nonesuch


@pytest.mark.parametrize("name", ddim_fast.__all__)
def test_no_public_name_is_a_module_too(name):
    """Importing ``ddim_fast.NAME`` would set the package's attribute to the module, and hide what is public."""
    assert importlib.util.find_spec(f"ddim_fast.{name}") is None


def test_accelerating_and_the_command_restore_live_together():
    code = "import ddim_fast.restore; print(ddim_fast.unaccelerate.__name__, callable(ddim_fast.restore.main))"
    assert _python(code) == "unaccelerate True\n"
