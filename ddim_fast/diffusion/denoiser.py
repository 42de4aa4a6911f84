"""The denoiser: a network, and everything that bends its prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.config import DiffusionModel
from ..models.unet import UNet
from .guidance import ClassifierGuidance, Gradient, apply_guidance, check_guide, guided_steps
from .network import Network, NetworkConditions, with_labels
from .schedule import NoiseSchedule

__all__ = ["Conditions", "Denoiser", "Prepared"]


class Conditions(NamedTuple):
    """The inputs of a prediction beside x: the precomputed timestep and class embeddings of the network and of its guide, and
    the guidance scale, a float32 tensor that broadcasts against x, or None without guidance."""

    network: NetworkConditions
    guide: NetworkConditions = ()
    scale: Tensor | None = None

    def unguided(self) -> Conditions:
        """The same for a step outside the guidance interval: one evaluation, with the labels."""
        return Conditions(self.network if self.guide or self.scale is None else with_labels(self.network))


class Prepared(NamedTuple):
    """All that is known of a run's predictions before its first step.

    Attributes:
        conditions: of all steps.
        unguided: the numbers of the steps that guidance leaves out.
        correction: (x, output, index) -> output, classifier guidance, which is a user's function and stays uncompiled.
    """

    conditions: Conditions
    unguided: tuple[int, ...] = ()
    correction: ClassifierGuidance | None = None


class Denoiser:
    """A network made ready for inference, with guidance: (x, conditions, step) -> prediction. Samplers share it, and their
    number costs no weights.

    Args:
        model: a :class:`ddim_fast.UNet`; what :meth:`ddim_fast.UNet.from_pretrained` loads, by its name or its path; or any
            module with a ``config`` like a U-Net's. It is put in eval mode. A U-Net is copied now, laid out for inference on
            its device: later changes do not reach this denoiser.
        dtype: what the network computes in: torch.float32, torch.bfloat16 or torch.float16; or torch.int8, for the convolutions
            of a U-Net on a CPU, whose scales the first sampler finds on a few images. x and predictions stay float32.
        guide: a worse network for the same images, smaller or trained for less long, that guidance leads away from (Karras et
            al. 2024, arXiv 2406.02507); None is the network itself without its label. One that is given by name or path is put
            on the model's device. With dtype torch.int8 it computes in the narrowest other one that is fast there.
        batch_invariant: an image of a U-Net is the same to the last bit alone and in any batch, in eager mode on a CPU. Where
            an operator of PyTorch's sums in another order for a single image, it computes that image twice; False saves that.

    Attributes:
        schedule: the network's noise schedule.

    Raises:
        FileNotFoundError: there is no model of that name.
        ValueError: an option is out of range, or the guide is of another kind; the message names it.
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

    def __repr__(self) -> str:
        shape, dtype = "x".join(map(str, self.config.image_shape)), str(self.dtype).removeprefix("torch.")
        guide = "" if self.guide is None else f", guide {type(self.guide).__name__}"
        return f"Denoiser({type(self.model).__name__} {shape}, {dtype}, {self.device}{guide})"

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self._network.device

    @property
    def networks(self) -> tuple[DiffusionModel, ...]:
        """All that decides a prediction."""
        return (self.model,) if self.guide is None else (self.model, self.guide)

    @property
    def has_deep_features(self) -> bool:
        """Whether a call returns features that later calls can use again."""
        return self._network.has_deep_features

    def calibrate(self, sample: Callable[[], object]) -> None:
        """Finds the scales of 8-bit convolutions for what ``sample`` calls them with."""
        self._network.quantise(sample)
        self.needs_calibration = False

    def prepare(
        self,
        timesteps: np.ndarray,
        labels: Tensor | None,
        guidance: float | None = None,
        guidance_interval: tuple[int, int] | None = None,
        gradient: Gradient | None = None,
        clip_sample_range: float | None = None,
    ) -> Prepared:
        """Computes what is known before the first step: the embeddings of all timesteps and classes.

        Args:
            timesteps: (S,) int64, in the order of the steps.
            labels: (N,) int64 on the device, or None.
            guidance, guidance_interval, gradient: as of :meth:`ddim_fast.Sampler.sample`, checked.
            clip_sample_range: of the x_0 that ``gradient`` is given.
        """
        timesteps = np.ascontiguousarray(timesteps)
        there = torch.from_numpy(timesteps).to(self.device)
        guide = None if guidance is None else self._guide
        conditions = Conditions(
            self._network.conditions(there, labels, guided=guidance is not None and guide is None),
            () if guide is None else guide.conditions(there, labels, guided=False),
            None if guidance is None else torch.tensor(guidance, dtype=torch.float32, device=self.device),
        )
        correction = None
        if gradient is not None:
            levels = self.schedule.alphas_cumprod[timesteps]
            correction = ClassifierGuidance(gradient, there, levels, self.config.prediction_type, clip_sample_range)
        skipped = ~guided_steps(timesteps, guidance, guidance_interval)
        return Prepared(conditions, () if guidance is None else tuple(np.flatnonzero(skipped).tolist()), correction)

    def conditions_each(
        self, timesteps: Tensor, labels: Tensor | None, guidance: float | None, guidance_interval: tuple[int, int] | None
    ) -> Conditions:
        """The conditions of a single step, number 0, in which each image has a timestep of its own, (N,) int64."""
        guide = None if guidance is None else self._guide
        own = self._network.conditions_each(timesteps, labels, guidance is not None and guide is None)
        if guidance is None:
            return Conditions(own)
        scale = torch.where(guided_steps(timesteps, guidance, guidance_interval), guidance, 1.0).float()[:, None, None, None]
        return Conditions(own, () if guide is None else guide.conditions_each(timesteps, labels, False), scale)

    def evaluations(self, timesteps: np.ndarray, guidance: float | None, guidance_interval: tuple[int, int] | None) -> int:
        """How often a run evaluates the network for each image; evaluations of a guide are not counted."""
        again = 0 if self._guide is not None else int(guided_steps(timesteps, guidance, guidance_interval).sum())
        return len(timesteps) + again

    def __call__(
        self, x: Tensor, conditions: Conditions, index: Tensor, deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction and the deep features at step ``index``: arguments and results as of :meth:`Network.__call__`,
        with conditions as :meth:`prepare` returns them."""
        scale = conditions.scale
        if scale is None or conditions.guide:
            output, deep = self._network(x, conditions.network, index, deep)
            guide: Any = self._guide
            return output if scale is None else apply_guidance(guide(x, conditions.guide, index)[0], output, scale), deep
        # Without and with the labels, by one network call on both halves.
        output, deep = self._network(torch.cat([x, x]), conditions.network, index, deep)
        unlabelled, labelled = output.chunk(2)
        return apply_guidance(unlabelled, labelled, scale), deep
