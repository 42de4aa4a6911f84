"""What samplers without torch have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..diffusion.request import as_array
from ..io.pictures import check_floats

__all__ = ["Device", "host_array"]


class Device(NamedTuple):
    """The device of the results: the host, wherever the network runs."""

    type: str = "cpu"


def host_array(x_T: Any) -> np.ndarray:
    """Noise given as an array, or as a tensor by a program with torch."""
    if hasattr(x_T, "detach"):
        check_floats(x_T)
        x_T = x_T.detach().float().cpu()
    return np.ascontiguousarray(as_array(x_T))
