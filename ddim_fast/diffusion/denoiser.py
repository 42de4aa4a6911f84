"""The denoiser: a network with its dtype and guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..models.config import DiffusionModel
from ..models.unet import UNet
from .guidance import ClassifierGuidance, Gradient, Scale, apply_guidance, check_guide, guided_steps
from .network import Network, NetworkConditions, with_labels
from .schedule import NoiseSchedule

__all__ = ["Conditions", "Denoiser", "Prepared"]


class Conditions(NamedTuple):
    """The inputs of a prediction beside x: the precomputed timestep and class embeddings of the network and of its guide, and
    the scales of guidance, (S, ...) float32, each of which broadcasts against x; or None without guidance."""

    network: NetworkConditions
    guide: NetworkConditions = ()
    scale: Tensor | None = None

    def unguided(self) -> Conditions:
        """The inputs of a step outside the guidance interval: one evaluation, with the labels."""
        return Conditions(self.network if self.guide or self.scale is None else with_labels(self.network))


class Prepared(NamedTuple):
    """The inputs of a run's predictions, computed before its first step.

    Attributes:
        conditions: the conditions of all steps.
        unguided: the numbers of the unguided steps.
        correction: (x, output, index) -> output, classifier guidance; a user's function, which runs uncompiled.
    """

    conditions: Conditions
    unguided: tuple[int, ...] = ()
    correction: ClassifierGuidance | None = None


class Denoiser:
    """A network prepared for inference, with guidance: (x, conditions, step) -> prediction. Several samplers can share it
    without copies of the weights.

    Args:
        model: a :class:`ddim_fast.UNet`; a name or path for :meth:`ddim_fast.UNet.from_pretrained`; or any module with a
            ``config`` like a U-Net's. It is put in eval mode. A U-Net is copied now in its layout for inference, so later
            changes do not affect this denoiser.
        dtype: dtype of the network's computation: torch.float32, torch.bfloat16 or torch.float16; or torch.int8, for the
            convolutions of a U-Net on a CPU, which the first sampler calibrates on a few images. x and predictions stay
            float32.
        guide: a worse network for the same images, smaller or trained for less time, that guidance leads away from (Karras et
            al. 2024, arXiv 2406.02507); None is the network itself without its label. A guide given by name or path is put on
            the model's device. With dtype torch.int8 it computes in the narrowest other dtype that is fast there.
        batch_invariant: a U-Net's image is the same to the last bit alone and in any batch, in eager mode on a CPU. A single
            image is computed twice if one of PyTorch's operators would sum in another order for it; False saves that.

    Attributes:
        schedule: the network's noise schedule.

    Raises:
        FileNotFoundError: there is no model of that name.
        ValueError: an option is out of range, or the guide does not match the network; the message names it.
    """

    def __init__(
        self,
        model: DiffusionModel | str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        guide: DiffusionModel | str | Path | None = None,
        batch_invariant: bool = True,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or int8; got {dtype}")
        if isinstance(model, (str, Path)):
            model = UNet.from_pretrained(model)
        if isinstance(guide, (str, Path)):
            guide = UNet.from_pretrained(guide).to(next(model.parameters()).device)
        self.model, self.guide, self.dtype = model.eval(), guide, dtype
        self.config = model.config
        self.schedule = NoiseSchedule.from_config(model.config)
        self._network = Network(self.model, dtype, batch_invariant=batch_invariant)
        self._guide: Network | None = None
        if guide is not None:
            check_guide(model.config, guide.config)
            self._guide = Network(guide.eval(), dtype, batch_invariant=batch_invariant)
        self.needs_calibration = dtype == torch.int8

    @classmethod
    def of(cls, model: DiffusionModel | Denoiser | str | Path, **options: Any) -> Denoiser:
        """The denoiser of a model, with the options that are not None; or a denoiser itself, which takes none.

        Raises:
            ValueError: an option is given with a denoiser, or as of the class.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if not isinstance(model, Denoiser):
            return cls(model, **given)
        if given:
            raise ValueError(f"{next(iter(given))} is an option of the Denoiser, which this sampler shares with others")
        return model

    def __repr__(self) -> str:
        shape, dtype = "x".join(map(str, self.config.image_shape)), str(self.dtype).removeprefix("torch.")
        guide = "" if self.guide is None else f", guide {type(self.guide).__name__}"
        return f"Denoiser({type(self.model).__name__} {shape}, {dtype}, {self.device}{guide})"

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._network.device

    @property
    def networks(self) -> tuple[DiffusionModel, ...]:
        """The networks that decide a prediction."""
        return (self.model,) if self.guide is None else (self.model, self.guide)

    def network_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the network's copy that computes, by their names in :attr:`model`."""
        return self._network.modules()

    @property
    def has_deep_features(self) -> bool:
        """Whether a call returns features that later calls can reuse."""
        return self._network.has_deep_features

    def calibrate(self, sample: Callable[[], object]) -> None:
        """Calibrate 8-bit convolutions on the inputs that ``sample`` gives them."""
        self._network.quantise(sample)
        self.needs_calibration = False

    def prepare(
        self,
        timesteps: np.ndarray,
        labels: Tensor | None,
        guidance: Scale | None = None,
        guidance_interval: tuple[int, int] | None = None,
        gradient: Gradient | None = None,
        clip_sample_range: float | None = None,
    ) -> Prepared:
        """Compute the inputs known before the first step: the embeddings of all timesteps and classes.

        Args:
            timesteps: (S,) int64 or float64, in the order of the steps.
            labels: (N,) int64 on the device, or None.
            guidance, guidance_interval, gradient: as of :meth:`ddim_fast.Sampler.sample`, checked.
            clip_sample_range: the clipping of the x_0 for ``gradient``.
        """
        timesteps = np.ascontiguousarray(timesteps)
        there = torch.from_numpy(timesteps).to(self.device)
        guide = None if guidance is None else self._guide
        conditions = Conditions(
            self._network.conditions(there, labels, guided=guidance is not None and guide is None),
            () if guide is None else guide.conditions(there, labels, guided=False),
            None if guidance is None else torch.from_numpy(np.full(len(timesteps), guidance, np.float32)).to(self.device),
        )
        correction = None
        if gradient is not None:
            levels = self.schedule.levels(timesteps)[:-1]
            correction = ClassifierGuidance(gradient, there.long(), levels, self.config.prediction_type, clip_sample_range)
        skipped = ~guided_steps(timesteps, guidance, guidance_interval)
        return Prepared(conditions, () if guidance is None else tuple(np.flatnonzero(skipped).tolist()), correction)

    def conditions_each(
        self, timesteps: Tensor, labels: Tensor | None, guidance: float | None, guidance_interval: tuple[int, int] | None
    ) -> Conditions:
        """The conditions of a single step, number 0, with a timestep for each image, (N,) int64."""
        guide = None if guidance is None else self._guide
        own = self._network.conditions_each(timesteps, labels, guidance is not None and guide is None)
        if guidance is None:
            return Conditions(own)
        scale = torch.where(guided_steps(timesteps, guidance, guidance_interval), guidance, 1.0).float()
        return Conditions(
            own, () if guide is None else guide.conditions_each(timesteps, labels, False), scale[None, :, None, None, None]
        )

    def evaluations(self, timesteps: np.ndarray, guidance: Scale | None, guidance_interval: tuple[int, int] | None) -> int:
        """The number of network evaluations per image in a run; evaluations of a guide are not counted."""
        again = 0 if self._guide is not None else int(guided_steps(timesteps, guidance, guidance_interval).sum())
        return len(timesteps) + again

    def __call__(
        self, x: Tensor, conditions: Conditions, index: Tensor, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction and the deep features at step ``index``: arguments and results as of :meth:`Network.__call__`,
        with conditions as :meth:`prepare` returns them."""
        if conditions.scale is None:
            return self._network(x, conditions.network, index, deep)
        scale = conditions.scale.index_select(0, index.reshape(1))[0]
        if conditions.guide:
            output, deep = self._network(x, conditions.network, index, deep)
            guide: Any = self._guide
            return apply_guidance(guide(x, conditions.guide, index)[0], output, scale), deep
        # One network call on both halves, without and with the labels.
        output, deep = self._network(torch.cat([x, x]), conditions.network, index, deep)
        unlabelled, labelled = output.chunk(2)
        return apply_guidance(unlabelled, labelled, scale), deep
