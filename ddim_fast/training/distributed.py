"""One batch's loss and gradient, computed by several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SharedLoss"]

_dist: Any = torch.distributed  # mypy does not see all of its names


class SharedLoss:
    """The loss of a process's share of the batch; its backward pass leaves the gradient's mean over all processes in the
    parameters. All processes of :class:`ddim_fast.io.processes.Processes` make one, at the same time.

    Args:
        model: the network, whose parameters become those of the first process.
        loss_of: tensors -> the loss, a 0-dim tensor.
        count: the number of processes.
    """

    def __init__(self, model: Any, loss_of: Callable[..., Tensor], count: int) -> None:
        # The processes talk by gloo, which on GPUs is slow; None is that group.
        self._group = _dist.new_group(backend="nccl") if model.device.type == "cuda" else None
        self._count = count
        self._parallel = DistributedDataParallel(_Loss(model, loss_of), process_group=self._group)

    def __call__(self, *inputs: Any) -> Tensor:
        return self._parallel(*inputs)

    def only_here(self, is_so: bool) -> AbstractContextManager[None]:
        """Inside, where ``is_so``, gradients are added up in this process, and the next backward pass outside shares them."""
        return self._parallel.no_sync() if is_so else contextlib.nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes; the host does not wait for a GPU."""
        value = value.clone()
        _dist.all_reduce(value, group=self._group)
        return value / self._count


class _Loss(nn.Module):
    """A network with its loss: DistributedDataParallel follows the calls of a module that has the parameters."""

    def __init__(self, model: nn.Module, loss_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._loss_of = model, loss_of

    def forward(self, *inputs: Any) -> Tensor:
        return self._loss_of(*inputs)
