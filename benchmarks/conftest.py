"""What the files of --benchmark-json say of the machine."""

from __future__ import annotations

from typing import Any

from measure import machine


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What decides how fast something is, and no name of anybody's machine."""
    machine_info.clear()
    machine_info.update(machine())
