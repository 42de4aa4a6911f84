"""All commands: ``python -m ddim_fast sample ...`` or ``ddim_fast sample ...``; without a command, a list of them."""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from . import __version__

# Commands whose module is not beside this file, because a folder has their name.
_MODULES = {"models": "ddim_fast.cli.models"}


def main() -> None:
    commands = _commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, commands))
        print("usage: ddim_fast COMMAND [OPTIONS]\n\ncommands (ddim_fast COMMAND --help shows their options):")
        print("\n".join(f"  {command:{width}}  {summary}" for command, summary in commands.items()))
    elif name == "--version":
        print(__version__)
    elif name in commands:
        del sys.argv[1]
        runpy.run_module(_MODULES.get(name, f"ddim_fast.{name}"), run_name="__main__", alter_sys=True)
    else:
        known, alike = (["--help", "--version"], 0.8) if name.startswith("--") else (commands, 0.6)
        near = difflib.get_close_matches(name, known, n=1, cutoff=alike)
        hint = f"did you mean {near[0]}?" if near else "ddim_fast --help lists them, and options come after one"
        print(f"ddim_fast: error: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)


def _commands() -> dict[str, str]:
    """The commands, and the first sentence of each one's module, read without importing any."""
    here = Path(__file__).parent
    found = {path.stem: path for path in here.glob("*.py") if path.stem[0] != "_"}
    found |= {name: here.parent.joinpath(*module.split(".")).with_suffix(".py") for name, module in _MODULES.items()}
    sources = {name: path.read_text(encoding="utf-8") for name, path in sorted(found.items())}
    return {
        name: (ast.get_docstring(ast.parse(source)) or "").partition(": ``")[0]
        for name, source in sources.items()
        if 'if __name__ == "__main__":' in source
    }


if __name__ == "__main__":
    main()
