"""ddim_fast: fast, checkable DDIM sampling.

Names are loaded when they are first used, so importing the package needs neither torch nor Triton nor a GPU. The file
__init__.pyi lists them.
"""

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.2.0"

# By name the module that defines it, from lines "from MODULE import NAME as NAME".
_MODULES = {
    line.split()[3]: line.split()[1]
    for line in Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8").splitlines()
    if line.startswith("from ")
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ddim_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
