"""How the library computes when nothing is trained."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["inference"]


class inference(torch.no_grad):
    """A context, or a decorator of functions and generators: no gradients, and the precision that was asked for, not that of a
    torch.autocast around it."""

    def __enter__(self) -> None:
        super().__enter__()
        self._precision = contextlib.ExitStack()
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                self._precision.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *error: object) -> None:
        self._precision.close()
        super().__exit__(*error)
