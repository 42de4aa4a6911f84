"""One batch's loss and gradient, computed by several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..io.processes import Processes

__all__ = ["ShardedLoss", "SharedLoss", "average_into", "part_like", "whole"]

_dist: Any = torch.distributed  # mypy does not see all of its names

# Of the residual blocks; UNet.condition reads them before the blocks run.
_READ_BEFORE = ("time_emb_proj.weight", "time_emb_proj.bias", "conv1.bias")


class SharedLoss:
    """The loss of a process's share of the batch; its backward pass leaves the gradient's mean over all processes in the
    parameters. All processes make one, at the same time.

    Args:
        model: the network, whose parameters become those of the first process.
        loss_of: tensors -> the loss, a 0-dim tensor.
        processes: more than one.
    """

    def __init__(self, model: Any, loss_of: Callable[..., Tensor], processes: Processes) -> None:
        self._group, self._count = processes.group(model.device.type), processes.count
        self._parallel = self._make_parallel(model, loss_of)

    def _make_parallel(self, model: Any, loss_of: Callable[..., Tensor]) -> nn.Module:
        return DistributedDataParallel(_Loss(model, loss_of), process_group=self._group)

    def __call__(self, *inputs: Any) -> Tensor:
        return self._parallel(*inputs)

    def only_here(self, is_so: bool) -> AbstractContextManager[None]:
        """Inside, where ``is_so``, gradients are added up in this process, and the next backward pass outside shares them."""
        return self._parallel.no_sync() if is_so else contextlib.nullcontext()  # type: ignore[operator]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes; the host does not wait for a GPU."""
        value = value.clone()
        _dist.all_reduce(value, group=self._group)
        return value / self._count


class ShardedLoss(SharedLoss):
    """:class:`SharedLoss` with the parameters and gradients split among the processes (torch's ``fully_shard``; Zhao et al.
    2023, arXiv 2304.11277). Each parameter of ``model`` becomes a DTensor, of which a process holds a part; so does what is
    made like it afterwards: the optimizer's state, averages. A block's parameters are gathered where it computes, forward and
    backward; those of the layers around the blocks, for a whole step.

    The processes have the same parameters already; making it, unlike calling it, waits for none of them.
    """

    def _make_parallel(self, model: Any, loss_of: Callable[..., Tensor]) -> nn.Module:
        loss, blocks = _Loss(model, loss_of), list(model.blocks())
        mesh = DeviceMesh.from_group(self._group, model.device.type)
        untrained = {p for p in model.parameters() if not p.requires_grad}  # an autoencoder's few: they stay whole
        of_blocks: set[nn.Parameter] = {
            p for block in blocks for name, p in block.named_parameters() if not name.endswith(_READ_BEFORE)
        }
        fully_shard(loss, mesh=mesh, ignored_params=untrained | of_blocks)
        for block in blocks:
            of_others = {p for p in block.parameters() if p not in of_blocks}
            fully_shard(block, mesh=mesh, ignored_params=of_others)
        return loss

    def only_here(self, is_so: bool) -> AbstractContextManager[None]:
        """Nothing: gradients are shared in each backward pass, as adding them up here would take whole ones."""
        return contextlib.nullcontext()


class _Loss(nn.Module):
    """A network with its loss: torch follows the calls of a module that has the parameters."""

    def __init__(self, model: nn.Module, loss_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._loss_of = model, loss_of

    def forward(self, *inputs: Any) -> Tensor:
        return self._loss_of(*inputs)


def average_into(averages: Iterable[Tensor], tensors: Iterable[Tensor], share: float) -> None:
    """Move averages towards tensors, which may be split alike, by a share of the way.

    The parts in this process are moved: of DTensors torch would find out anew, with each share, how the list is split."""
    mine, theirs = (
        [t.to_local() if isinstance(t, DTensor) else t for t in map(Tensor.detach, of)] for of in (averages, tensors)
    )
    torch._foreach_lerp_(mine, theirs, share)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or the whole of one that is split: then all processes call this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which every process has, split as ``like`` is, if that is split."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
