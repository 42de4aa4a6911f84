"""A network prepared for inference."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import inference
from ..models.config import DiffusionModel
from ..models.quantisation import quantise
from ..models.unet import UNet
from ..ops.devices import bf16_is_fast, keep_memory

__all__ = ["Network", "NetworkConditions", "with_labels"]

# The precomputed embeddings, and labels if those select their rows.
NetworkConditions = tuple[Tensor, ...]


class Network:
    """``model`` as a function (x, precomputed embeddings, step number) -> prediction.

    Args:
        model: takes (N, C, H, W) images, (N,) or 0-dim timesteps and (N,) labels or None. A model with a method
            ``for_inference(dtype)`` is converted now, once; others compute under autocast. If it has the methods ``condition``
            and ``denoise_reusing`` (see :class:`ddim_fast.UNet`), the first is called once for all steps.
        dtype: dtype of the network's computation. torch.int8, for a U-Net on a CPU, means 8-bit convolutions once
            :meth:`quantise` has calibrated them, and everything else in the narrowest dtype that is fast there.
        batch_invariant: as of :meth:`ddim_fast.UNet.for_inference`.

    Raises:
        ValueError: the model does not support 8-bit convolutions here.
    """

    def __init__(self, model: DiffusionModel, dtype: torch.dtype, *, batch_invariant: bool = True) -> None:
        self._converts = hasattr(model, "for_inference")
        if dtype == torch.int8:
            device = next(model.parameters()).device
            if not isinstance(model, UNet) or device.type != "cpu":
                raise ValueError(
                    f"dtype torch.int8 is for a ddim_fast.UNet on a CPU, not for {type(model).__name__} on {device}"
                )
            dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
        elif dtype != torch.float32:
            _warn_if_slow(dtype, next(model.parameters()).device)
        options = {"batch_invariant": batch_invariant} if isinstance(model, UNet) else {}
        with inference():
            self._model: Any = model.for_inference(dtype, **options) if hasattr(model, "for_inference") else model
        self._dtype = dtype
        self._autocast = dtype != torch.float32 and not self._converts
        self._conditions_itself = hasattr(model, "condition") and hasattr(model, "denoise_reusing")
        self.num_classes: int | None = model.config.num_classes
        keep_memory(self.device)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self._model.parameters()).device

    @property
    def has_deep_features(self) -> bool:
        """Whether a call returns features that later calls can reuse."""
        return self._conditions_itself

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that compute, by name."""
        return self._model.named_modules()

    def quantise(self, sample: Callable[[], object]) -> None:
        """Give the convolutions 8-bit products, calibrated on their inputs during ``sample``."""
        quantise(self._model, sample)

    def conditions(self, timesteps: Tensor, labels: Tensor | None, guided: bool) -> NetworkConditions:
        """The precomputed timestep and class embeddings; for a U-Net, their projections for every residual block.

        Args:
            timesteps: (S,) int64, in the order of the steps.
            labels: (N,) or None; an unconditional network ignores them.
            guided: whether each image is also evaluated without its label; these come first.
        """
        classes, labels = self.num_classes, self._labels(labels, guided)
        if not self._conditions_itself:
            return (timesteps,) if labels is None else (timesteps, labels)
        if classes is None or labels is None:
            return (self._model.condition(timesteps)[:, None],)
        # One row per class if there are fewer classes than images. This depends on their numbers alone, and so do the shapes.
        by_class = classes + 1 <= len(labels)
        rows = torch.arange(classes + 1, device=labels.device) if by_class else labels
        table = self._model.condition(timesteps.repeat_interleave(len(rows)), rows.repeat(len(timesteps)))
        table = table.unflatten(0, (len(timesteps), len(rows)))
        return (table, labels) if by_class else (table,)

    def conditions_each(self, timesteps: Tensor, labels: Tensor | None, guided: bool) -> NetworkConditions:
        """The same for a single step, number 0, with a timestep for each image.

        Args:
            timesteps: (N,) int64.
            labels: (N,) or None.
            guided: as for :meth:`conditions`.
        """
        labels, timesteps = self._labels(labels, guided), timesteps.repeat(2) if guided else timesteps
        if not self._conditions_itself:
            return (timesteps[None],) if labels is None else (timesteps[None], labels)
        return (self._model.condition(timesteps, labels)[None],)

    def _labels(self, labels: Tensor | None, guided: bool) -> Tensor | None:
        """The labels of all evaluations: "no class" before each image's own, if they are guided."""
        if not guided:
            return None if self.num_classes is None else labels
        assert self.num_classes is not None and labels is not None
        return torch.cat([torch.full_like(labels, self.num_classes), labels])

    def __call__(
        self, x: Tensor, conditions: NetworkConditions, index: Tensor, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction at step ``index``.

        Args:
            x: (N, C, H, W) float32.
            conditions: as :meth:`conditions` returns them.
            index: () int64 on the device of x; the host does not read it.
            deep: deep features to reuse, from earlier calls for the same images; None computes them.

        Returns:
            (N, C, H, W) float32, contiguous, and the deep features, or None.
        """
        # The layout of the input decides the whole network's, and convolutions are faster in channels_last. Images of one
        # channel count as channels_last without a copy, but the first convolution does not see that.
        dtype = self._dtype if self._converts else None
        x = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last).copy_(x)
        rows = conditions[0].index_select(0, index.reshape(1))[0]
        labels = conditions[1] if len(conditions) > 1 else None
        with torch.autocast(x.device.type, self._dtype) if self._autocast else contextlib.nullcontext():
            if self._conditions_itself:
                condition = rows if labels is None else rows.index_select(0, labels)
                output, deep = self._model.denoise_reusing(x, condition, deep)
            else:
                output = self._model(x, rows, None if labels is None else labels.expand(len(x)))
        # Back to the layout of the sample: a solver's step takes a single pass only over tensors of one layout.
        return output.float().contiguous(), deep


def _warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and (dtype == torch.float16 or not bf16_is_fast(device)):
        warnings.warn(
            f"{dtype} may be slow: this processor seems to lack instructions for it; a network then took 5 to 9 times as long "
            "as in torch.float32",
            stacklevel=5,
        )


def with_labels(conditions: NetworkConditions) -> NetworkConditions:
    """The labelled half of the conditions of :meth:`Network.conditions` for guidance."""
    if len(conditions) == 1:
        return (conditions[0].chunk(2, dim=1)[1],)
    rows, labels = conditions
    return rows, labels.chunk(2)[1]
