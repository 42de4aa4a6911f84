"""What is asked of a sampler, as tensors on its device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .guidance import Gradient
from .request import check_request

if TYPE_CHECKING:
    from .sampler import Sampler

__all__ = ["TensorRequest", "as_tensor"]


@dataclass(frozen=True)
class TensorRequest:
    """What a sampler is asked for: checked, and on its device. A slice of it is some of its images."""

    seeds: Tensor | None
    x_T: Tensor | None
    labels: Tensor | None
    guidance: float | None
    guidance_interval: tuple[int, int] | None = None
    gradient: Gradient | None = None

    @classmethod
    def check(
        cls,
        sampler: Sampler,
        seeds: Sequence[int] | None,
        x_T: Tensor | None,
        labels: int | Sequence[int] | Tensor | None,
        guidance: float | None,
        guidance_interval: Sequence[int] | None = None,
        gradient: Gradient | None = None,
    ) -> TensorRequest:
        """The arguments of :meth:`ddim_fast.Sampler.sample`, and its errors."""
        device = sampler.device
        x_T = None if x_T is None else as_tensor(x_T)
        if gradient is not None and sampler.runs_whole:
            raise ValueError(
                "gradient is called between the steps of a run, and there is no between in a captured run or with a tolerance; "
                "use engine eager or compiled, and fixed steps"
            )
        checked = check_request(
            sampler.config,
            stochastic=sampler.solver.stochastic,
            seeds=seeds,
            x_T=x_T,
            labels=labels,
            guidance=guidance,
            guidance_interval=guidance_interval,
            with_guide=sampler.guide is not None,
        )
        if checked.guidance_interval is not None and sampler.reuse > 1 and sampler.guide is None:
            raise ValueError(
                f"guidance_interval evaluates the network for other images in some steps; use reuse=1, not {sampler.reuse}"
            )
        return cls(
            None if seeds is None else torch.tensor(checked.seeds, dtype=torch.int64, device=device),
            None if x_T is None else _in_plain_layout(x_T.to(device, torch.float32)),
            None if checked.labels is None else torch.from_numpy(checked.labels).to(device),
            checked.guidance,
            checked.guidance_interval,
            gradient,
        )

    def __len__(self) -> int:
        return len(self.x_T if self.seeds is None else self.seeds)

    def __getitem__(self, part: slice) -> TensorRequest:
        return self._map(lambda t: t[part])

    def padded(self, size: int) -> TensorRequest:
        """The same, its last image repeated up to ``size`` images."""
        missing = size - len(self)
        return self._map(lambda t: torch.cat([t, t[-1:].expand(missing, *t.shape[1:])])) if missing else self

    def _map(self, f: Callable[[Tensor], Tensor]) -> TensorRequest:
        tensors = {name: getattr(self, name) for name in ("seeds", "x_T", "labels")}
        return dataclasses.replace(self, **{name: f(t) for name, t in tensors.items() if t is not None})


def as_tensor(images: Any) -> Tensor:
    """Images, noise or measurements, given as a tensor or as an array.

    Raises:
        ValueError: they are neither.
    """
    if isinstance(images, Tensor):
        return images
    try:
        return torch.from_numpy(np.array(images, np.float32))  # a copy: an array that can only be read makes no tensor
    except (TypeError, ValueError):
        raise ValueError(f"images and noise are tensors or arrays of numbers; got {type(images).__name__}") from None


def _in_plain_layout(x_T: Tensor) -> Tensor:
    """With the values of x_T, and else as if made from seeds: images of one channel can have other strides, and count as
    contiguous all the same, which compiled code does not think."""
    return torch.empty_like(x_T, memory_format=torch.contiguous_format).copy_(x_T.detach())
