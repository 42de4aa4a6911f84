"""What importing the package promises."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys

import pytest

import ddim_fast
from ddim_fast.__main__ import _commands, main

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


def test_the_package_shows_its_public_names():
    assert set(dir(ddim_fast)) == {*ddim_fast.__all__, "__version__"}
    assert {"Sampler", "UNet", "save_images", "to_pil"} <= set(dir(ddim_fast))


def test_pictures_are_saved_without_torch(tmp_path):
    code = f"import ddim_fast as d, numpy as np; print(d.save_images(np.zeros((2, 3, 4, 4), np.float32), {str(tmp_path)!r}))"
    assert "1.png" in _python(_BLOCK_TORCH + code)


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


@pytest.mark.slow
def test_accelerating_and_the_command_restore_live_together():
    code = "import ddim_fast.restore; print(ddim_fast.unaccelerate.__name__, callable(ddim_fast.restore.main))"
    assert _python(code) == "unaccelerate True\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_package_lists_its_commands(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddim_fast", *arguments])
    main()
    listed = re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    assert {"sample", "train", "doctor"} <= dict(listed).keys() and "media" not in dict(listed)


def test_the_package_runs_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddim_fast", "sample", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: python -m ddim_fast.sample ")


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddim_fast", "sampel"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "ddim_fast: error: there is no command 'sampel'; did you mean sample?\n"


def test_the_version_is_that_of_the_installation(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ddim_fast", "--version"])
    main()
    assert capsys.readouterr().out.strip() == ddim_fast.__version__ == importlib.metadata.version("ddim_fast")


def test_importing_the_package_takes_no_time():
    """50 ms on a machine at rest; a busy one is allowed four times as long. The shortest of a few is taken."""
    code = "import time; t = time.perf_counter(); import ddim_fast; print(time.perf_counter() - t)"
    assert min(float(_python(_BLOCK_TORCH + code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize("command", _commands())
def test_help_is_quick_and_needs_no_torch(command):
    run = "runpy.run_module('ddim_fast', run_name='__main__')"
    code = f"import sys, runpy; sys.argv = ['ddim_fast', {command!r}, '--help']; {run}"
    assert _python(_BLOCK_TORCH + code).startswith(f"usage: python -m ddim_fast.{command} ")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = subprocess.Popen([sys.executable, "-m", "ddim_fast.doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.stdout.close()
    assert (command.wait(60), command.stderr.read()) == (1, b"")
