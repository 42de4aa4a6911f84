"""What is asked of a sampler, checked: for tensors and for arrays, so without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..models.config import UNetConfig
from ..ops.noise import check_seeds
from ..ops.scalars import is_whole, plain
from .guidance import check_guidance, check_interval

__all__ = ["Checked", "check_batch_size", "check_request"]


class Checked(NamedTuple):
    """A request that can be served.

    Attributes:
        count: N, the number of images.
        seeds: N whole numbers, or None.
        labels: (N,) int64, or None for no label.
        guidance: the scale, None where it changes nothing.
        guidance_interval: the timesteps that it is limited to, or None.
    """

    count: int
    seeds: list[int] | None
    labels: np.ndarray | None
    guidance: float | None
    guidance_interval: tuple[int, int] | None


def check_request(
    config: UNetConfig,
    *,
    stochastic: bool,
    seeds: Sequence[int] | Any | None,
    x_T: Any,
    labels: Any,
    guidance: float | None,
    guidance_interval: Sequence[int] | None = None,
    with_guide: bool = False,
) -> Checked:
    """The arguments of :meth:`ddim_fast.Sampler.sample`.

    Args:
        config: the network.
        stochastic: whether the solver draws noise, for which it needs seeds.
        seeds, x_T, labels, guidance, guidance_interval: as there; x_T and labels of torch or of numpy.
        with_guide: guidance is away from another network.

    Raises:
        ValueError: they do not fit each other or the network; the message names what does not.
    """
    if seeds is None and x_T is None:
        raise ValueError("sampling starts from seeds or from x_T; give one of them")
    if seeds is None and stochastic:
        raise ValueError("a stochastic sampler draws noise by seed; give seeds as well as x_T")
    if x_T is not None and tuple(x_T.shape[1:]) != config.image_shape:
        raise ValueError(f"expected images of shape (N, {', '.join(map(str, config.image_shape))}); got {tuple(x_T.shape)}")
    seeds = None if seeds is None else check_seeds(seeds)
    count = len(x_T if seeds is None else seeds)
    if x_T is not None and len(x_T) != count:
        raise ValueError(f"{count} seeds do not fit {len(x_T)} images in x_T")
    return Checked(
        count,
        seeds,
        _check_labels(labels, count, config.num_classes),
        check_guidance(guidance, labels, with_guide),
        check_interval(guidance_interval, guidance, config.num_train_timesteps),
    )


def check_batch_size(batch_size: int) -> int:
    """The images a network call.

    Raises:
        ValueError: it is no whole number of 1 or more.
    """
    batch_size = plain(batch_size)
    if not is_whole(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of 1 or more; got {batch_size!r}")
    return batch_size


def _check_labels(labels: Any, count: int, num_classes: int | None) -> np.ndarray | None:
    if labels is None:
        return None
    if num_classes is None:
        raise ValueError("the network is unconditional: it takes no class labels")
    checked = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if checked.size and not np.issubdtype(checked.dtype, np.integer):
        raise ValueError(f"class labels are whole numbers; got {checked.dtype}")
    checked = np.broadcast_to(checked, (count,)) if checked.ndim == 0 else checked
    if checked.shape != (count,):
        raise ValueError(f"{len(checked)} class labels do not fit {count} images")
    bad = checked[(checked < 0) | (checked >= num_classes)]
    if len(bad):
        raise ValueError(f"class {int(bad[0])} is out of range: the network has classes 0..{num_classes - 1}")
    return checked.astype(np.int64)
