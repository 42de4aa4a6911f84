"""Where modules lie, and what they import: see docs/architecture.md."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddim_fast"
COMMANDS = {path.stem for path in PACKAGE.glob("[!_]*.py") if "__main__" in path.read_text()}


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Of this package, also those in functions and under TYPE_CHECKING."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                target = f"{source}.{name.name}"
                found.add(target if target in modules else source)
    return (found & modules.keys()) - {module}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    modules = _modules()
    # Names of the package itself are loaded when they are first used, so `from .. import __version__` imports nothing.
    return {
        m: _imports(m, p, modules) - {"ddim_fast"}
        for m, p in modules.items()
        if m.removeprefix("ddim_fast.") not in {"ddim_fast", *FORMER}
    }


# Documented in version 0.1.
FORMER = {
    "media": "image_grid",
    "training.data": "load_images",
    "audio.reading": "load_sounds",
    "diffusion.operators": "Downscale",
}


def test_only_commands_lie_at_the_top():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} - FORMER.keys() == COMMANDS


@pytest.mark.parametrize("module,name", FORMER.items())
def test_former_modules_still_serve_and_say_their_new_name(module, name):
    sys.modules.pop(f"ddim_fast.{module}", None)
    with pytest.warns(FutureWarning, match=rf"ddim_fast\.{module} is now ddim_fast\."):
        assert hasattr(importlib.import_module(f"ddim_fast.{module}"), name)


def test_nothing_imports_a_command(imports):
    commands = {f"ddim_fast.{name}" for name in COMMANDS}
    assert {module: found & commands for module, found in imports.items() if found & commands} == {}


def test_no_module_imports_itself_by_way_of_others(imports):
    below: dict[str, set[str]] = {}

    def all_below(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in below:
            found = imports.get(module, set())
            below[module] = found.union(*(all_below(other, (*path, module)) for other in found))
        return below[module]

    for module in imports:
        all_below(module, ())


# From the highest to the lowest. A room imports from those below it; those on one line do not import each other.
ROOMS = """
cli
jobs
evaluation training deploy interop
data
audio
diffusion
engine
models
ops
io
"""


def test_rooms_import_downwards_only(imports):
    level = {room: number for number, line in enumerate(ROOMS.split("\n")) for room in line.split()}
    for module, found in imports.items():
        room = module.split(".")[1]
        for other in {name.split(".")[1] for name in found} - {room}:
            assert room in COMMANDS or level[room] < level[other], f"{module} imports {other}"
