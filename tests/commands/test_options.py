"""What the options of several commands have in common."""

import importlib

import pytest

COMMANDS = (
    "demo",
    "edit",
    "evaluate",
    "export",
    "interpolate",
    "reconstruct",
    "restore",
    "restore_sounds",
    "restyle",
    "sample",
    "train",
)
# Each, and the commands in which it means something else: a list, say, or an optimiser's steps.
SHARED = {
    "--model": ("restyle", "restore_sounds"),
    "--device": (),
    "--compile": ("train",),
    "--engine": ("sample",),
    "--dtype": ("export", "train"),
    "--guidance": ("sample", "evaluate"),
    "--guidance-interval": (),
    "--guide": (),
    "--exact": (),
    "--convert": (),
    "--resize": (),
    "--clip": (),
    "--batch-size": ("evaluate", "export", "train"),
    "--steps": ("evaluate", "train"),
    "--spacing": ("evaluate",),
}


@pytest.fixture(scope="module")
def options():
    parsers = {name: importlib.import_module(f"ddim_fast.{name}")._parser() for name in COMMANDS}
    return {name: parser._option_string_actions for name, parser in parsers.items()}


@pytest.mark.parametrize("option", SHARED)
def test_an_option_is_the_same_in_every_command(option, options):
    found = [by[option] for name, by in options.items() if option in by and name not in SHARED[option]]
    assert len(found) > 1
    assert len({(action.type, action.default, action.metavar, action.help, action.dest) for action in found}) == 1


def test_former_names_are_nowhere_else(options):
    assert [name for name, by in options.items() if "--num" in by] == ["evaluate"]
    assert [name for name, by in options.items() if "--precision" in by] == ["train"]
    assert {name for name, by in options.items() if "--num-images" in by} == {"evaluate", "restore", "sample"}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_has_two_defaults(command):
    parser = importlib.import_module(f"ddim_fast.{command}")._parser()
    formatter = parser._get_formatter()
    helps = {str(action.option_strings): formatter._expand_help(action) for action in parser._actions if action.help}
    assert helps and not {option: text for option, text in helps.items() if text.count("(default") > 1}
