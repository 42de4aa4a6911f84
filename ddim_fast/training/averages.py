"""Averages of the weights whose length is chosen after the training (Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models", section 3 and appendix C).

An exponential average forgets at a fixed rate, so its decay must be chosen for the length of the run, before it. A
power-function average counts the weights of step tau in proportion to tau^gamma: it is as long, relative to the run, whenever
the run is stopped. Its length is the standard deviation of that profile as a share of the run. Two of them are kept while
training, snapshots of both are written, and a least-squares combination of the snapshots is then an average of any length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..io.files import errors_name_file
from ..models.weights import check_finite, read_safetensors, write_safetensors
from .distributed import average_into, part_like, whole

__all__ = ["LENGTHS", "MAX_LENGTH", "Average", "PowerAverages", "average_of_length", "exponent_of_length", "snapshots"]

# Of the two averages that are kept: Karras et al.'s choice.
LENGTHS = (0.05, 0.10)

# Of the profile of exponent 0, the plain mean of all steps: 1 / sqrt(12), rounded down.
MAX_LENGTH = 0.288


class PowerAverages:
    """Two power-function averages of ``model``'s parameters, of the lengths :data:`LENGTHS`.

    Args:
        model: the network followed; its parameters are read, never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = dict(model.named_parameters())
        self._averages = {length: {n: p.detach().clone() for n, p in self._weights.items()} for length in LENGTHS}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number ``step``, counted from 0 (ibid., section 3.1)."""
        for length, average in self._averages.items():
            kept = (1 - 1 / (step + 1)) ** (exponent_of_length(length) + 1)
            average_into(average.values(), self._weights.values(), 1 - kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, ``length/name``."""
        return {f"{length}/{name}": t for length, average in self._averages.items() for name, t in average.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from averages saved before."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(part_like(tensor, state[name]))

    def write_snapshot(self, folder: Path, steps: int, is_writer: bool = True) -> None:
        """Write the averages as they are after ``steps`` steps, in float16, for :func:`average_of_length`.

        Args:
            is_writer: whether this is the one that writes, of processes that share the averages and call this together.
        """
        tensors = {name: whole(tensor.half()) for name, tensor in self.state_dict().items()}
        if is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / f"{steps:08d}.safetensors", tensors)


class Average(NamedTuple):
    """The result of :func:`average_of_length`.

    Attributes:
        weights: by the network's names, float32.
        steps: after how many steps of the training.
        error: of its profile, relative to the one asked for (root mean square over the steps). It grows where there are few
            snapshots, and away from the lengths that were kept.
    """

    weights: dict[str, Tensor]
    steps: int
    error: float


def average_of_length(folder: Path, length: float) -> Average:
    """The average of that length, at the last of the snapshots in ``folder``.

    Raises:
        ValueError: the length is out of range, or a snapshot is damaged or of another network.
        FileNotFoundError: there are no snapshots.
    """
    exponent = exponent_of_length(length)
    paths = snapshots(folder)
    if not paths:
        raise FileNotFoundError(f"there are no snapshots of averages in {folder}: train with --ema-snapshots")
    steps = np.repeat(list(paths), len(LENGTHS))
    exponents = np.tile([exponent_of_length(kept) for kept in LENGTHS], len(paths))
    end = max(paths)
    gram = _inner_product(steps[:, None], exponents[:, None], steps, exponents)
    wanted = _inner_product(steps, exponents, end, exponent)
    # Profiles of neighbouring snapshots are nearly the same: scaled to norm 1 the system is as well conditioned as it can be.
    norm = np.sqrt(np.diag(gram))
    coefficients = np.linalg.lstsq(gram / np.outer(norm, norm), wanted / norm, rcond=None)[0] / norm
    own = _inner_product(end, exponent, end, exponent)
    error = np.sqrt(max(0.0, 1 - (2 * coefficients @ wanted - coefficients @ gram @ coefficients) / own))
    return Average(_combine(paths.values(), coefficients.reshape(len(paths), len(LENGTHS))), end, float(error))


def snapshots(folder: Path) -> dict[int, Path]:
    """The files of :meth:`PowerAverages.write_snapshot`, by their steps, in that order."""
    paths = {int(path.stem): path for path in folder.glob("*.safetensors") if path.stem.isdecimal()}
    return dict(sorted(paths.items()))


@functools.cache
def exponent_of_length(length: float) -> float:
    """gamma of the profile tau^gamma that has this relative standard deviation (ibid., appendix C).

    Raises:
        ValueError: there is none, or a negative one.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ValueError(f"the length of an average must be above 0 and at most {MAX_LENGTH}; got {length}")
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _inner_product(t: np.ndarray | int, a: np.ndarray | float, u: np.ndarray | int, b: np.ndarray | float) -> np.ndarray:
    """The integral over tau of the product of two profiles: (a + 1) tau^a / t^(a + 1), which ends at t, and (b, u)'s."""
    later = np.where(t < u, b, a)  # its exponent: the earlier one's power of t cancels against the end of the integral
    ratio = np.minimum(t, u) / np.maximum(t, u)
    return (a + 1) * (b + 1) / (a + b + 1) * ratio**later / np.maximum(t, u)


def _combine(paths: Iterable[Path], coefficients: np.ndarray) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for path, of_lengths in zip(paths, coefficients, strict=True):
        snapshot = read_safetensors(path)
        with errors_name_file(path):
            check_finite(snapshot)
        for length, coefficient in zip(LENGTHS, of_lengths, strict=True):
            prefix = f"{length}/"
            average = {n.removeprefix(prefix): t for n, t in snapshot.items() if n.startswith(prefix)}
            if not average or (total and average.keys() != total.keys()):
                raise ValueError(f"{path}: not a snapshot of this network's averages")
            for name, tensor in average.items():
                if name in total and total[name].shape != tensor.shape:
                    raise ValueError(f"{path}: not a snapshot of this network's averages")
                total[name] = total.get(name, 0) + float(coefficient) * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}
