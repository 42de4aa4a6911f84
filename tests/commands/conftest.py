"""What the tests of commands share: how one is run."""

import contextlib
import itertools
import os
import sys

import pytest
import torch

from ddim_fast.cli.parser import run_command
from ddim_fast.evaluation.inception import NAME, FeatureNetwork


@pytest.fixture
def here(tmp_path):
    """The folder in which commands run."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def checkpoint(small_unet, tmp_path):
    """The folder of a small random model of 16x16 RGB images of ten classes."""
    folder = tmp_path / "checkpoint"
    small_unet.save_pretrained(folder)
    return folder


@pytest.fixture
def run_here(monkeypatch, capsys, tmp_path):
    """Run a command, which is a module, in ``here`` (or ``where``) and in this process; returns its exit code, stdout and
    stderr."""

    def run(command, *arguments, where=tmp_path / "here"):
        where.mkdir(exist_ok=True)
        monkeypatch.chdir(where)
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_command(command.main)
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """A context in which Ctrl-C is pressed just before file number ``moment``, from 0, comes to its place."""

    @contextlib.contextmanager
    def interrupted_at(moment):
        replace, files = os.replace, itertools.count()

        def replace_or_stop(*places):
            if next(files) == moment:
                raise KeyboardInterrupt
            replace(*places)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_stop)
            yield

    return interrupted_at


@pytest.fixture
def tiny_inception(monkeypatch):
    """A feature network of six features in the place of Inception, with other weights where it is given a name."""

    def load(path, name=None):
        torch.manual_seed(len(name or ""))
        layers = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 6))
        return FeatureNetwork(layers, name or NAME, 6, size=16)

    monkeypatch.setattr("ddim_fast.cli.evaluation.load_inception", load)
