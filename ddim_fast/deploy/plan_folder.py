"""The folder of an export to a plan of native operators, and reading it without torch.

plan.json       the sampler's settings, and its runs as calls of operators (csrc/plan.h)
weights.safetensors  what the calls read, in float32: a processor's own layout is made when they are loaded
config.json     the network's configuration, as in a checkpoint
README.md       for people                      SHA256SUMS     of all the others, as sha256sum writes them
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ..io.files import errors_name_file, read_json
from ..io.processes import cpu_threads
from ..models.checkpoint import load_config
from ..models.config import UNetConfig
from ..ops import native
from ..ops.scalars import is_finite, is_whole
from .folder import PLAN, check_fields, verify

__all__ = ["FORMAT", "GUIDED", "PLAIN", "WEIGHTS", "PlanFolder", "Run"]

WEIGHTS = "weights.safetensors"

# The runs: without guidance, and with.
PLAIN, GUIDED = "plain", "guided"

FORMAT = 2

# Keys of plan.json.
_FIELDS = {
    "format": int,
    "settings": dict,
    "dtype": str,
    "stochastic": bool,
    "batch_size": int,
    "timesteps": list,
    "runs": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Run:
    """A run made ready for this processor.

    Attributes:
        plan: of the native module.
        segments: its memory, kept alive: first what lives between two calls.
        addresses: where each segment begins.
        inputs: by name, the arrays that a run reads anew.
        result: (N, C, H, W) float32, a view of the first segment.
    """

    plan: Any
    segments: list[np.ndarray]
    addresses: list[int]
    inputs: dict[str, np.ndarray]
    result: np.ndarray

    def __call__(self) -> None:
        """Executes it."""
        self.plan.run(self.addresses, 0, len(self.plan), cpu_threads())


@dataclass(frozen=True)
class PlanFolder:
    """An export with its files checked.

    Attributes:
        path: the folder.
        config: the network.
        description: the contents of plan.json.
        identity: a checksum of the whole folder.
    """

    path: Path
    config: UNetConfig
    description: dict[str, Any]
    identity: str
    _laid_out: dict[tuple[Any, ...], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> PlanFolder:
        """Read a folder's description.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, was changed, or was written by a later version.
        """
        identity = verify(path, "config.json", PLAN, WEIGHTS)
        description = read_json(path / PLAN)
        with errors_name_file(path / PLAN):
            check_fields(description, _FIELDS)
            if description["format"] != FORMAT:
                raise ValueError(
                    f"format {description['format']} is not the one of this version, {FORMAT}; export the model again"
                )
            if description["batch_size"] < 1 or PLAIN not in description["runs"]:
                raise ValueError("'batch_size' or 'runs' is damaged; export the model again")
            config: UNetConfig = load_config(path)
            if not all(is_finite(t) and 0 <= t < config.num_train_timesteps for t in description["timesteps"]):
                raise ValueError("'timesteps' is damaged; export the model again")
        return cls(path, config, description, identity)

    def run(self, name: str) -> Run:
        """A run, its weights laid out for this processor. Runs share them.

        Raises:
            ValueError: a file is damaged, or the processor lacks what the run needs.
            RuntimeError: the native module was not built.
        """
        if native.module is None:
            raise RuntimeError(f"a plan is executed by the C++ operators: {native.why_not}")
        with errors_name_file(self.path / WEIGHTS):
            try:
                weights = safetensors.numpy.load_file(self.path / WEIGHTS)
            except (safetensors.SafetensorError, KeyError, ValueError) as error:
                raise ValueError(f"not a whole safetensors file ({error}); export the model again") from None
        with errors_name_file(self.path / PLAN):
            try:
                return self._make(self.description["runs"][name], weights)
            except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
                raise ValueError(f"run {name!r} is damaged ({type(error).__name__}: {error}); export the model again") from None

    def _make(self, run: dict[str, Any], weights: dict[str, np.ndarray]) -> Run:
        count, shape = self.description["batch_size"], self.config.image_shape
        size, offset = run["bytes"], run["result"]
        images = count * int(np.prod(shape)) * 4
        if not is_whole(size) or not is_whole(offset) or not 0 <= offset <= size - images or offset % 4 or size > 1 << 40:
            raise ValueError("the result lies outside the memory; export the model again")
        inputs = {
            "x": np.zeros((count, *shape), np.float32),
            "seeds": np.zeros(count, np.int64),
            "labels": np.zeros(2 * count if run["guided"] else count, np.int64),
            "scale": np.zeros(len(self.description["timesteps"]), np.float32),
        }
        segments = [np.zeros(size, np.uint8)]
        for segment in run["segments"]:
            if "input" in segment:
                segments.append(inputs[segment["input"]])
                continue
            key = tuple(sorted(segment.items()))
            if key not in self._laid_out:
                self._laid_out[key] = _lay_out(segment, weights)
            segments.append(self._laid_out[key])
        sizes = [(a.nbytes, i == 0) for i, a in enumerate(segments)]
        calls = [(call[0], [tuple(place) for place in call[1]], call[2], call[3]) for call in run["calls"]]
        plan = native.module.Plan(sizes, calls)
        result = segments[0][offset : offset + images].view(np.float32).reshape(count, *shape)
        return Run(plan, segments, [a.ctypes.data for a in segments], inputs, result)


def _lay_out(segment: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    """Weights as operators read them on this processor."""
    weight, kind = np.ascontiguousarray(weights[segment["weight"]]), segment["kind"]
    if kind == "raw":
        return weight
    bf16 = segment["dtype"] == "bfloat16"
    if weight.dtype != np.float32 or segment["dtype"] not in ("float32", "bfloat16"):
        raise ValueError("weights are float32, and read as float32 or bfloat16; export the model again")
    dtype = np.uint16 if bf16 else np.float32
    addresses, shape = weight.ctypes.data, weight.shape
    if kind == "product" and weight.ndim == 2:
        out = np.empty(native.module.prepared_product_numbers(*shape), dtype)
        native.module.prepare_product(addresses, out.ctypes.data, *shape, bf16)
    elif kind == "conv3x3" and weight.ndim == 4 and shape[2:] == (3, 3):
        out = np.empty(((segment["tile"] + 2) ** 2, *shape[:2]), dtype)
        native.module.prepare_conv3x3(addresses, out.ctypes.data, *shape[:2], bf16, segment["tile"])
    else:
        raise ValueError(f"weights of shape {shape} cannot be laid out for {kind!r}; export the model again")
    return out
