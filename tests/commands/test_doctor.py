import importlib.metadata

import pytest

from ddim_fast import doctor
from ddim_fast.ops import native


@pytest.fixture
def run(run_here):
    return lambda: run_here(doctor)


def test_it_says_what_serves(run, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "reference")
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "  ddim_step float32         PyTorch, as DDIM_FAST_BACKEND says\n" in out
    assert f"  torch        {importlib.metadata.version('torch')}\n" in out


def test_it_says_why_something_does_not_serve(run, monkeypatch):
    monkeypatch.setenv("DDIM_FAST_BACKEND", "cuda")
    _, out, _ = run()
    assert "  group_norm_silu float32   none: DDIM_FAST_BACKEND=cuda cannot serve group_norm_silu: " in out
    monkeypatch.delenv("DDIM_FAST_BACKEND")
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_not", "there was no compiler")
    _, out, _ = run()
    assert "  C++ operators  there was no compiler\n" in out
    assert "  conv3x3 float32           PyTorch; not native: there was no compiler; not triton: " in out


def test_it_names_the_extras_that_are_missing(run, monkeypatch):
    version = importlib.metadata.version

    def without_audio(package):
        if package == "soundfile":
            raise importlib.metadata.PackageNotFoundError
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_audio)
    assert "  audio  soundfile: pip install 'ddim_fast[audio]'\n" in run()[1]
