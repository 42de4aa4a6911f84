"""Muon (Jordan et al. 2024): the momentum of a weight matrix, orthogonalised by Newton-Schulz iterations, is its update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Muon"]

# Not hidden: what comes from or goes to the images, and the embeddings.
_OUTER = ("conv_in.", "conv_out.", "class_embedding.", "time_embedding.")


class Muon(torch.optim.Optimizer):
    """torch's Muon for the hidden filters and linear layers of a U-Net, each as a matrix of outputs by inputs, and Adam for all
    other parameters. Updates of both have about the size of Adam's, so they share a learning rate.

    Args:
        model: in channels_last, so that the matrices are views of the filters.
        lr: learning rate.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        named = list(model.named_parameters())
        hidden = {name for name, p in named if p.ndim > 1 and not name.startswith(_OUTER)}
        self._model = model
        self._filters = [p for name, p in named if name in hidden]
        self._matrices = [nn.Parameter(_matrix(p.detach()).view(len(p), -1)) for p in self._filters]
        self._adam = torch.optim.Adam([p for name, p in named if name not in hidden], lr=lr, fused=True)
        self._muon = torch.optim.Muon(self._matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        super().__init__([*self._adam.param_groups, *self._muon.param_groups], {})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all of the model's parameters."""
        self._model.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters; none where the attribute ``found_inf``, a () float32 tensor, is 1, as of fused optimizers."""
        found: Tensor | None = getattr(self, "found_inf", None)
        for matrix, p in zip(self._matrices, self._filters, strict=True):
            matrix.grad = None if p.grad is None else _matrix(p.grad).reshape(matrix.shape)
            if found is not None and matrix.grad is not None:
                matrix.grad = torch.where(found.bool(), 0.0, matrix.grad)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in self._matrices if self.state.get(matrix)]
        before = [] if found is None else [(found.bool(), t, t.clone()) for t in (*self._matrices, *buffers)]
        self._adam.found_inf = found  # type: ignore[attr-defined]
        # What load_state_dict has replaced.
        for optimizer, group in zip((self._adam, self._muon), self.param_groups, strict=True):
            optimizer.param_groups, optimizer.state = [group], self.state
            optimizer.step()
        for is_bad, tensor, kept in before:
            tensor.copy_(torch.where(is_bad, kept, tensor))


def _matrix(filters: Tensor) -> Tensor:
    """(O, I, H, W) -> (O, H, W, I): contiguous in channels_last. The order of a matrix's columns does not matter to Muon."""
    return filters.permute(0, 2, 3, 1) if filters.ndim == 4 else filters
