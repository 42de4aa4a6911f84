"""A sampling request: the arguments of a sampler, checked once. The checks need no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io.pictures import check_floats
from ..io.progress import count_of
from ..models.config import UNetConfig
from ..ops.noise import check_seeds
from ..ops.scalars import is_whole, plain
from .guidance import Gradient, Scale, check_guidance, check_interval

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Request", "as_array", "as_tensor"]


@dataclass(frozen=True)
class Request:
    """The checked request of images, as arrays or tensors. A slice selects some of its images.

    Attributes:
        seeds: (N,) int64, or None.
        x_T: (N, C, H, W), or None.
        labels: (N,) int64, or None for no label.
        guidance: the scale, or the scales of the steps; None if they change nothing.
        guidance_interval: the first and last guided timestep, or None.
        gradient: the function of classifier guidance, or None.
    """

    seeds: Any
    x_T: Any = None
    labels: Any = None
    guidance: Scale | None = None
    guidance_interval: tuple[int, int] | None = None
    gradient: Gradient | None = None

    @classmethod
    def check(
        cls,
        config: UNetConfig,
        *,
        stochastic: bool,
        has_guide: bool = False,
        steps: int | None = None,
        seeds: Sequence[int] | Any | None = None,
        x_T: Any = None,
        labels: Any = None,
        guidance: float | Sequence[float] | None = None,
        guidance_interval: Sequence[int] | None = None,
        gradient: Gradient | None = None,
    ) -> Request:
        """Check the arguments of :meth:`ddim_fast.Sampler.sample`; seeds and labels become arrays, x_T stays as it is.

        Args:
            config: the network.
            stochastic: whether the solver draws noise, which needs seeds.
            has_guide: whether guidance leads away from another network.
            steps: the number of steps that may each have a scale of guidance; None where all have the same.

        Raises:
            ValueError: they do not fit each other or the network; the message names the argument.
        """
        if seeds is None and x_T is None:
            raise ValueError("sampling starts from seeds or from x_T; give one of them")
        if seeds is None and stochastic:
            raise ValueError("a stochastic sampler draws noise by seed; give seeds as well as x_T")
        if x_T is not None and tuple(x_T.shape[1:]) != config.image_shape:
            raise ValueError(f"expected images of shape (N, {', '.join(map(str, config.image_shape))}); got {tuple(x_T.shape)}")
        seeds = None if seeds is None else np.array(check_seeds(seeds), np.int64)
        count = len(x_T if seeds is None else seeds)
        if x_T is not None and len(x_T) != count:
            raise ValueError(f"{count_of(count, 'seeds')} for {count_of(len(x_T), 'images')} in x_T; give one each")
        scale = check_guidance(guidance, labels, has_guide)
        if isinstance(scale, tuple) and len(scale) != steps:
            right = "it takes a single scale here" if steps is None else f"give one, or one for each of the {steps} steps"
            raise ValueError(f"guidance has {count_of(len(scale), 'scales')}; {right}")
        return cls(
            seeds,
            x_T,
            _check_labels(labels, count, config.num_classes),
            scale,
            check_interval(guidance_interval, guidance, config.num_train_timesteps),
            gradient,
        )

    def to(self, device: torch.device) -> Request:
        """The same as tensors on a device, x_T in float32."""
        import torch

        def moved(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device)

        x_T = None
        if self.x_T is not None:
            # A copy in the layout of noise from seeds: images of one channel count as contiguous with other strides too, but
            # not for compiled code.
            x_T = self.x_T.detach().to(device, torch.float32)
            x_T = torch.empty_like(x_T, memory_format=torch.contiguous_format).copy_(x_T)
        return dataclasses.replace(self, seeds=moved(self.seeds), x_T=x_T, labels=moved(self.labels))

    def __len__(self) -> int:
        return len(self.x_T if self.seeds is None else self.seeds)

    def __getitem__(self, images: Any) -> Request:
        arrays = {name: getattr(self, name) for name in ("seeds", "x_T", "labels")}
        return dataclasses.replace(self, **{name: a[images] for name, a in arrays.items() if a is not None})

    def batches(self, batch_size: int, *, padded: bool = False) -> Iterator[tuple[Request, int]]:
        """Its images, ``batch_size`` at a time, with the number of images wanted from each batch.

        Args:
            padded: fill up a smaller last batch with its last image.

        Raises:
            ValueError: the batch size is not a whole number of 1 or more.
        """
        batch_size = plain(batch_size)
        if not is_whole(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of 1 or more; got {batch_size!r}")
        for start in range(0, len(self), batch_size):
            batch = self[start : start + batch_size]
            count, size = len(batch), min(batch_size, len(self))
            yield batch[[min(i, count - 1) for i in range(size)]] if padded and count < size else batch, count

    def compute(
        self, function: Callable[[Request], tuple[Tensor, ...]], batch_size: int, empty: tuple[Tensor, ...], *, padded: bool
    ) -> list[Tensor]:
        """The results of ``function`` for all batches, or ``empty`` without images. Arguments as of :meth:`batches`."""
        import torch

        wanted = ([result[:count] for result in function(batch)] for batch, count in self.batches(batch_size, padded=padded))
        return [torch.cat(parts) for parts in zip(empty, *wanted, strict=True)]


def as_tensor(images: Any) -> Tensor:
    """Images, noise or measurements as a tensor, from a tensor or an array.

    Raises:
        ValueError: they are neither, or not floating-point.
    """
    import torch

    if not isinstance(images, torch.Tensor):
        return torch.from_numpy(as_array(images))
    check_floats(images)
    return images


def as_array(images: Any) -> np.ndarray:
    """The same as a float32 array, from anything that converts to an array. It is a copy, because a read-only array makes no
    tensor."""
    try:
        given = np.asarray(images)
        floats = np.array(given, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"images and noise must be tensors or arrays of numbers; got {type(images).__name__}") from None
    check_floats(given)
    return floats


def _check_labels(labels: Any, count: int, num_classes: int | None) -> np.ndarray | None:
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError("the network is unconditional: it takes no class labels")
    checked = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if checked.size and not np.issubdtype(checked.dtype, np.integer):
        raise ValueError(f"class labels must be whole numbers; got {checked.dtype}")
    checked = np.broadcast_to(checked, (count,)) if checked.ndim == 0 else checked
    if checked.shape != (count,):
        raise ValueError(f"{count_of(len(checked), 'class labels')} for {count_of(count, 'images')}; give one each")
    bad = checked[(checked < 0) | (checked >= num_classes)]
    if len(bad):
        raise ValueError(f"class {int(bad[0])} is out of range: the network has classes 0..{num_classes - 1}")
    return checked.astype(np.int64)
