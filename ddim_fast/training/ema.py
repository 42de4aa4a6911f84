"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .distributed import average_into, part_like

__all__ = ["EMA"]


class EMA:
    """shadow <- d * shadow + (1 - d) * weights after each step, with d = min(decay, (1 + n) / (10 + n)) at step n, so that a
    short run is not an average of its initialisation.

    Args:
        model: the network followed; its parameters are read, never changed.
        decay: the final decay; 0.9999 in DDPM.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay must be in [0, 1); got {decay}")
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self.shadow = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        average_into(self.shadow.values(), self._weights.values(), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from averaged weights saved before."""
        for name, value in self.shadow.items():
            value.copy_(part_like(value, state[name]))
