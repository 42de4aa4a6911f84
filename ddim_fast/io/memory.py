"""The memory that a process may take."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

__all__ = ["available_memory"]


def available_memory() -> int:
    """Bytes that are free for this process: of the machine, or of its control group where that has less, divided among the
    processes that torchrun has started here."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, TypeError, ValueError):  # Linux alone has these files
        free.append(1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]))  # type: ignore[index]
    with contextlib.suppress(OSError, TypeError, ValueError):
        # Containers and schedulers limit a job by its control group.
        own = re.search(r"^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)[1]  # type: ignore[index]
        group = Path("/sys/fs/cgroup") / own
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
