"""The training loop, as a generator: logging, checkpoints and stopping are the caller's."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data.images import ImageSet, to_unit_range
from ..diffusion.schedule import NoiseSchedule
from ..io.files import errors_name_file
from ..io.processes import Processes
from ..models.audio import AudioConfig
from ..models.autoencoder import Autoencoder
from ..models.checkpoint import WEIGHTS, save_checkpoint
from ..models.unet import UNet
from ..models.weights import check_finite, read_pickle, read_weights
from .averages import PowerAverages
from .checkpoints import TrainingCheckpoint, save_consistency
from .distributed import ShardedLoss, SharedLoss, part_like, whole
from .ema import EMA
from .loss import AutoencoderLoss, ConsistencyLoss, DenoisingLoss
from .muon import Muon
from .options import TRAINING_STATE, TrainingOptions

__all__ = ["TRAINING_STATE", "Trainer", "TrainingOptions", "TrainingStep"]

# Held-out images whose random numbers are drawn together.
_HELD_OUT_AT_ONCE = 64

M = TypeVar("M", UNet, Autoencoder)


@dataclass(frozen=True)
class TrainingStep:
    """The report of one step. ``loss`` and ``grad_norm``, of the whole batch, are 0-dim float32 tensors on the device: reading
    them waits for it. Where one of them is not finite, the step has changed no weights."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    lr: float


class Trainer(Generic[M]):
    """Trains ``model``, a U-Net or an autoencoder, on ``data``; iterate :meth:`run`.

    Every random number of step n comes from a generator seeded by (seed, n), so a run that stops and resumes equals one
    that never stopped. Each process draws the numbers of the whole batch, and computes its share of the images: an image has
    the same noise, timestep, label and mirroring whatever the number of processes and of slices. Dropout inside the network is
    drawn for a slice; it depends on the number of slices of a batch in all processes.

    Args:
        processes: those that share each batch, with the same model, data and options; None is this one alone.
        held_out: images for :meth:`validation_loss`.
        teacher: for ``options.consistency``, the network as it was when the training began, on the same device.

    Raises:
        ValueError: the labels do not fit the network, the data is not the network's size, the options do not fit the number of
            processes, or there is no teacher for ``options.consistency``.
    """

    def __init__(
        self,
        model: M,
        data: ImageSet,
        options: TrainingOptions,
        processes: Processes | None = None,
        held_out: ImageSet | None = None,
        teacher: UNet | None = None,
    ) -> None:
        self._num_classes = model.config.num_classes if isinstance(model, UNet) else None
        for images in (data, *([] if held_out is None else [held_out])):
            _check_fits(images, model.config.image_shape, self._num_classes)
        # fully_shard takes contiguous parameters alone.
        memory_format = torch.contiguous_format if options.shard else torch.channels_last
        self.model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.data = data.to(model.device)
        self.held_out = None if held_out is None else held_out.to(model.device)
        self.options = options
        self.processes = Processes(alone=True) if processes is None else processes
        self._slice_size = options.slice_size(self.processes.count)
        self.step = 0
        self._loss = self._make_loss(teacher).to(model.device)
        # On a GPU as CUDA graphs: launching the step's thousand kernels from Python takes longer than they run.
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        self._loss_of_batch = torch.compile(self._loss_of, fullgraph=True, mode=mode) if options.compile else self._loss_of
        # Before all that is made like the parameters.
        self._sharded = ShardedLoss(model, self._loss_of_batch, self.processes) if options.shard else None
        self.ema = EMA(model, options.ema)
        self._averages = None if options.ema_snapshots is None else PowerAverages(model)
        self.optimizer: torch.optim.Optimizer
        if options.optimizer == "muon":
            self.optimizer = Muon(model, options.lr)
        else:
            self.optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def run(self) -> Iterator[TrainingStep]:
        """Train until ``options.steps``, yielding after each step. ``tqdm(trainer.run(), initial=trainer.step,
        total=trainer.options.steps)`` shows a progress bar."""
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.options.accumulate > 1:
            # A slice's gradient may lie in memory that the next slice's CUDA graph writes, so it is added up elsewhere.
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        shared: SharedLoss | None = self._sharded
        if shared is None and self.processes.count > 1:
            shared = SharedLoss(self.model, self._loss_of_batch, self.processes)
        while self.step < self.options.steps:
            loss = self._backward(shared)
            grad_norm = whole(nn.utils.clip_grad_norm_(parameters, self.options.grad_clip))
            lr = self._learning_rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            # With this a fused optimizer changes nothing, as after an overflow of torch.amp; it is read on the device alone.
            self.optimizer.found_inf = (~(loss + grad_norm).isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self.ema.update(self.step)
            if self._averages is not None:
                self._averages.update(self.step)
            self.step += 1
            yield TrainingStep(self.step, loss, grad_norm, lr)

    def _backward(self, shared: SharedLoss | None) -> Tensor:
        """Leave the gradient of the present step's batch in the parameters; returns its loss."""
        size, slices = self.options.batch_size, self.options.accumulate
        rank, share = self.processes.rank, slices * self._slice_size
        own = slice(rank * share, (rank + 1) * share)
        images, labels = self._images(self.data, self.indices(self.step)[own])
        torch.manual_seed(_mix(self.options.seed, self.step))
        images, labels = self._augment(images, labels, own)
        drawn = tuple(numbers[own] for numbers in self._loss.draw(self.model, images, size))
        self.optimizer.zero_grad(set_to_none=slices == 1)
        total = torch.zeros((), device=images.device)
        for k, part in enumerate(self._slices(images, labels, drawn)):
            if self._slice_size < size:
                torch.manual_seed(_mix(_mix(self.options.seed, self.step), rank * slices + k))  # of the dropout
            torch.compiler.cudagraph_mark_step_begin()
            with contextlib.nullcontext() if shared is None else shared.only_here(k < slices - 1):
                loss = (self._loss_of_batch if shared is None else shared)(*part) / slices
                loss.backward()
            total += loss.detach()
        return total if shared is None else shared.mean(total)

    def _slices(
        self, images: Tensor, labels: Tensor | None, drawn: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """What is computed at once: images, their labels, and their random numbers with what the loss makes of these."""
        for start in range(0, len(images), self._slice_size):
            part = slice(start, start + self._slice_size)
            own, labels_of = images[part], None if labels is None else labels[part]
            yield own, labels_of, self._loss.complete(own, labels_of, tuple(numbers[part] for numbers in drawn))

    @torch.no_grad()
    def validation_loss(self) -> float:
        """The loss of the averaged weights on the held-out images, which the processes share. Each image has the same timestep
        and noise in every call, whatever the seed, the batch size and the number of processes."""
        assert self.held_out is not None
        model, count, total = self.averaged_model(), len(self.held_out), 0.0
        for start in self.processes.share(range(0, count, _HELD_OUT_AT_ONCE)):
            numbers = torch.arange(start, min(start + _HELD_OUT_AT_ONCE, count))
            images, labels = self._images(self.held_out, numbers)
            torch.manual_seed(_mix(-1, start))
            drawn = self._loss.draw(model, images, len(images))
            for part in self._slices(images, labels, drawn):
                total += self._loss_of(*part, model).item() * len(part[0])
        return self.processes.total([total])[0] / count

    def averaged_model(self) -> M:
        """A copy of the network with the averaged weights, in eval mode. With ``shard``, all processes make one together."""
        with torch.device("meta"):
            model = type(self.model)(self.model.config)
        model.load_state_dict({name: whole(t).clone() for name, t in self.ema.state_dict().items()}, assign=True)
        if isinstance(model, UNet):
            model.audio = self._audio
        return model.eval()

    @property
    def takes_part(self) -> bool:
        """Whether this process must call what copies averages or state: the first one, and with ``shard`` all together."""
        return self.processes.is_first or self.options.shard

    def checkpoint(self) -> TrainingCheckpoint | None:
        """A copy on the CPU of what :meth:`save` writes, as it is now. It may be written while the training goes on. With
        ``shard``, all processes make it together; it is None in all but the first."""
        if isinstance(self.model, Autoencoder):
            self._fit_scale()
        state = {
            "step": self.step,
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "averages": None if self._averages is None else self._averages.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        copied = _copied(state, self.processes.is_first)
        return TrainingCheckpoint(copied, self.model.config, self._audio) if self.processes.is_first else None

    def save(self, folder: Path) -> None:
        """Write ``folder``: the averaged weights as a checkpoint to sample from, and training_state.pt to go on from. With
        ``shard``, all processes call it together, and the first one writes."""
        checkpoint = self.checkpoint()
        if checkpoint is not None:
            checkpoint.write(folder)

    def mend(self, folder: Path, own: dict[str, Tensor]) -> None:
        """Write the averaged weights in ``folder`` anew where they are not those that :meth:`load` has read there and
        returned: they are damaged, or of the checkpoint before."""
        try:
            stored = read_weights(folder, WEIGHTS)[1]
            if stored.keys() == own.keys() and all(torch.equal(stored[name], own[name]) for name in own):
                return
        except (FileNotFoundError, ValueError):
            pass
        save_checkpoint(folder, self.model.config, own, self._audio)
        save_consistency(folder, asdict(self.options))

    @property
    def _audio(self) -> AudioConfig | None:
        return self.model.audio if isinstance(self.model, UNet) else None

    def write_snapshot(self, folder: Path) -> None:
        """Write the averages of :attr:`TrainingOptions.ema_snapshots` as they are now: :mod:`ddim_fast.training.averages`. With
        ``shard``, all processes call it together, and the first one writes."""
        assert self._averages is not None
        self._averages.write_snapshot(folder, self.step, self.processes.is_first)

    def load(self, folder: Path) -> dict[str, Tensor]:
        """Go on from :meth:`save`, whatever the number of processes then and now, with ``shard`` or without.

        Returns:
            The averaged weights, whole, on the CPU.

        Raises:
            FileNotFoundError: there is no training_state.pt.
            ValueError: it is damaged, belongs to another network, or holds numbers that are not finite.
        """
        path = folder / TRAINING_STATE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {TRAINING_STATE} to go on from")
        try:
            state = read_pickle(path)
        except ValueError as error:
            raise ValueError(f"{path}: not a whole training state") from error
        # By their numbers in the optimizer's state.
        parameters = [(p, _kinds(group)) for group in self.optimizer.param_groups for p in group["params"]]
        try:
            step, averages = operator.index(state["step"]), state.get("averages")
            moments = dict(state["optimizer"]["state"])
            parts = [
                (state["model"], self.model.state_dict()),
                (state["ema"], self.ema.state_dict()),
                (
                    {f"{kind} of parameter {i}": moments[i][kind] for i in moments for kind in parameters[i][1]},
                    {
                        f"{kind} of parameter {i}": torch.zeros(()) if kind == "step" else parameters[i][0]
                        for i in moments
                        for kind in parameters[i][1]
                    },
                ),
            ]
            if self._averages is not None and averages is not None:
                parts.append((averages, self._averages.state_dict()))
            if step < 0 or not all(_fits(*part) for part in parts):
                raise ValueError("other tensors than this network's")
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the training state of another network") from error
        with errors_name_file(path):
            for tensors, _ in parts:
                check_finite(tensors)
        if self._averages is not None and averages is None:
            raise ValueError(f"{path}: the run kept no averages for snapshots so far, and an average begins with its run")
        self.step = step
        self.model.load_state_dict({n: part_like(own, state["model"][n]) for n, own in self.model.state_dict().items()})
        self.ema.load_state_dict(state["ema"])
        for i, values in moments.items():
            p, kinds = parameters[i]
            for kind in kinds:
                if kind != "step":  # as the parameter lies in memory, which fused optimizers take for granted
                    values[kind] = torch.empty_like(p).copy_(part_like(p, values[kind]))
        # The learning rate is set anew each step, and the groups are otherwise as they were made.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self._averages is not None:
            self._averages.load_state_dict(averages)
        return state["ema"]

    def _fit_scale(self) -> None:
        """Has the averaged autoencoder's latents brought to variance 1. The training itself does not use the scale."""
        averaged: Any = self.averaged_model()
        some = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))[:1000]  # data sets may be sorted
        averaged.fit_scale(to_unit_range(self.data.images[some.to(self.data.images.device)]))
        for name in ("latent_mean", "latent_std"):
            for weights in (self.model.state_dict(), self.ema.state_dict()):
                weights[name].copy_(getattr(averaged, name))

    def _make_loss(self, teacher: UNet | None) -> Any:
        if isinstance(self.model, Autoencoder):
            return AutoencoderLoss()
        if self.options.consistency is not None:
            if teacher is None:
                raise ValueError("consistency needs a teacher, the network as it was when the training began")
            return ConsistencyLoss(teacher, self.options.consistency, torch.bfloat16 if self.options.bf16 else torch.float32)
        config = self.model.config
        return DenoisingLoss(NoiseSchedule.from_config(config), config.prediction_type, self.options.min_snr_gamma)

    def _loss_of(
        self, images: Tensor, labels: Tensor | None, drawn: tuple[Tensor, ...], model: nn.Module | None = None
    ) -> Tensor:
        autocast = torch.autocast(images.device.type, torch.bfloat16) if self.options.bf16 else contextlib.nullcontext()
        with autocast:
            return self._loss(self.model if model is None else model, images, labels, drawn)

    def indices(self, step: int) -> Tensor:
        """The numbers of the images in the batch of ``step``, counted from 0: int64 (batch_size,), on the CPU. The data has a
        new order each epoch, and batches run on across its end."""
        first, size = step * self.options.batch_size, self.options.batch_size
        parts = []
        while size:
            epoch, start = divmod(first, len(self.data))
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(_mix(self.options.seed, -1 - epoch))
                self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator)
            parts.append(self._order[start : start + size])
            first, size = first + len(parts[-1]), size - len(parts[-1])
        return torch.cat(parts)

    def _images(self, data: ImageSet, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images of these numbers as float32, and their labels, on the network's device."""
        index, device = index.to(data.images.device), self.model.device
        labels = None if self._num_classes is None or data.labels is None else data.labels[index].to(device)
        images = data.images[index].to(device)
        return to_unit_range(images) if images.dtype == torch.uint8 else images, labels

    def _augment(self, images: Tensor, labels: Tensor | None, own: slice) -> tuple[Tensor, Tensor | None]:
        """Mirror images and drop labels at random.

        Args:
            own: where they lie in the batch.
        """
        size = self.options.batch_size
        if self.options.flip:
            mirrored = torch.rand(size, 1, 1, 1, device=images.device)[own] < 0.5
            images = torch.where(mirrored, images.flip(3), images)
        if labels is not None and self._num_classes is not None and self.options.label_dropout:
            dropped = torch.rand(size, device=labels.device)[own] < self.options.label_dropout
            labels = torch.where(dropped, self._num_classes, labels)
        return images, labels

    def _learning_rate(self, step: int) -> float:
        warmup, steps = self.options.warmup, self.options.steps
        if step < warmup:
            return self.options.lr * (step + 1) / warmup
        if self.options.lr_schedule == "constant":
            return self.options.lr
        return self.options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _copied(value: Any, is_kept: bool) -> Any:
    """The same with whole copies of the tensors, on the CPU, in dictionaries of any depth. Where it is not kept, this process
    only takes part in making split tensors whole."""
    if isinstance(value, dict):
        return {key: _copied(inner, is_kept) for key, inner in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = whole(value.detach())
    return value.to("cpu", copy=True) if is_kept else None


def _kinds(group: dict[str, Any]) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter in a group of its."""
    return ("momentum_buffer",) if "momentum" in group else ("step", "exp_avg", "exp_avg_sq")


def _check_fits(data: ImageSet, image_shape: tuple[int, ...], num_classes: int | None) -> None:
    """A ValueError where a network cannot be trained on the data."""
    if tuple(data.images.shape[1:]) != image_shape:
        raise ValueError(f"the network takes images of shape {image_shape}; the data has {tuple(data.images.shape[1:])}")
    if num_classes is None:
        return
    if data.labels is None:
        raise ValueError("the network is class-conditional, but the data has no labels")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}; the data has {low}..{high}")


def _fits(found: dict[str, Tensor], like: dict[str, Tensor]) -> bool:
    """Whether tensors that were read are those that they should be, by name and shape."""
    return found.keys() == like.keys() and all(
        isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and (tensor.shape, tensor.layout, tensor.device.type) == (like[name].shape, torch.strided, "cpu")
        for name, tensor in found.items()
    )


def _mix(seed: int, number: int) -> int:
    """A 63-bit seed from two numbers, different for all that occur (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + number + 1) & 0xFFFFFFFFFFFFFFFF
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) >> 1
