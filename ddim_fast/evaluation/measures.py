"""The measures of a model or of pictures. Each adds a row to the results, computed once, in shards, by all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.images import ImageSet, to_unit_range
from ..diffusion.adaptive import whitening
from ..diffusion.sampler import Sampler
from ..io.files import cache_folder
from ..io.pictures import to_uint8
from ..models.unet import UNet
from .denoising import by_noise, denoising_error, spread_timesteps
from .frechet import frechet_distance
from .inception import FeatureNetwork
from .kernel_distance import kernel_distance
from .precision_recall import precision_recall
from .reconstruction import reconstruction_error
from .reference import KEPT_FEATURES, Reference
from .results import fid_label
from .run import EvaluationRun
from .shards import Shards, alone, drawn, make_shards

__all__ = [
    "SampleSet",
    "Settings",
    "exact_images",
    "measure_loss",
    "measure_pictures",
    "measure_reconstruction",
    "measure_samples",
    "measure_trajectories",
]

# The settings that decide a row's numbers, as the results hold them.
Settings = dict[str, Any]


@dataclass(frozen=True)
class SampleSet:
    """The images to sample.

    Attributes:
        seeds: one per image.
        labels: their classes, or None.
        guidance: ``guidance`` and ``guidance_interval`` of :meth:`ddim_fast.Sampler.sample`.
    """

    seeds: range
    labels: list[int] | None
    guidance: dict[str, Any]

    def sample(self, sampler: Sampler, numbers: range, batch_size: int) -> Tensor:
        """(n, C, H, W): the images of these numbers, counted from the first seed."""
        part = slice(numbers.start, numbers.stop)
        labels = None if self.labels is None else self.labels[part]
        return sampler.sample(seeds=self.seeds[part], labels=labels, **self.guidance, batch_size=batch_size)


def measure_pictures(
    run: EvaluationRun, settings: Settings, pictures: Tensor, network: FeatureNetwork, reference: Reference
) -> None:
    """FID, KID, precision and recall of (N, C, H, W) uint8 pictures."""
    if run.has("quality", settings):
        return
    parts = run.rows("quality", settings, len(pictures), network.features, lambda n: network.of(pictures[n.start : n.stop]))
    run.record("quality", settings, parts, lambda: _quality(run, parts, network, reference))


def measure_samples(
    run: EvaluationRun,
    settings: Settings,
    make_sampler: Callable[[], Sampler],
    draws: SampleSet,
    network: FeatureNetwork,
    reference: Reference,
) -> None:
    """FID, KID, precision and recall of a sampler's images.

    Raises:
        ValueError: samples are not finite.
    """
    if run.has("quality", settings):
        return
    sampler = make_sampler()

    def compute(numbers: range) -> Tensor:
        images = draws.sample(sampler, numbers, run.batch_size)
        if not torch.isfinite(images).all():
            raise ValueError(f"{settings['model']}: the samples are not finite; try --dtype float32")
        features = network.of(torch.from_numpy(to_uint8(images)).movedim(-1, 1))
        assert sampler.evaluations is not None  # of these images
        return torch.cat([features.cpu(), sampler.evaluations[:, None].float()], dim=1)

    parts = run.rows("quality", settings, len(draws.seeds), network.features + 1, compute)

    def find() -> dict[str, Any]:
        return {"evaluations": float(parts.all()[:, -1].mean()), **_quality(run, parts, network, reference)}

    run.record("quality", settings, parts, find)


def measure_loss(run: EvaluationRun, settings: Settings, model: UNet, data: ImageSet) -> None:
    """The squared error of epsilon on held-out images, in float32: see :func:`denoising_error`."""
    if run.has("loss", settings):
        return
    network, total = model.for_inference(torch.float32), model.config.num_train_timesteps
    timesteps = spread_timesteps(len(data), total)

    def compute(numbers: range) -> Tensor:
        part = slice(numbers.start, numbers.stop)
        labels = None if data.labels is None else data.labels[part]
        images = to_unit_range(data.images[part])
        return denoising_error(network, images, labels, timesteps[part], numbers, run.batch_size)[:, None]

    parts = run.rows("loss", settings, len(data), 1, compute)

    def find() -> dict[str, Any]:
        errors = parts.all()[:, 0]
        each = by_noise(errors, timesteps.numpy(), total)
        return {"images": len(data), **_mean("loss", errors), "loss by timestep": each}

    run.record("loss", settings, parts, find)


def measure_reconstruction(run: EvaluationRun, settings: Settings, make_sampler: Callable[[], Sampler], data: ImageSet) -> None:
    """The squared error of held-out images that were encoded and decoded: see :func:`reconstruction_error`."""
    if run.has("reconstruction", settings):
        return
    sampler = make_sampler()

    def compute(numbers: range) -> Tensor:
        part = slice(numbers.start, numbers.stop)
        labels = None if data.labels is None else data.labels[part]
        return reconstruction_error(sampler, to_unit_range(data.images[part]), labels, run.batch_size)[:, None]

    parts = run.rows("reconstruction", settings, len(data), 1, compute, runs=2)
    run.record("reconstruction", settings, parts, lambda: {"images": len(data), **_mean("error", parts.all()[:, 0])})


def measure_trajectories(
    run: EvaluationRun,
    settings: Settings,
    make_sampler: Callable[[], Sampler],
    draws: SampleSet,
    exact: Callable[[], Tensor],
) -> None:
    """The root mean square distance of a sampler's images from those of :func:`exact_images`, which ``exact`` returns: in
    pixels, and whitened, with all frequencies weighed alike (:func:`ddim_fast.diffusion.adaptive.whitening`). Whitening keeps
    the mean square of the exact images."""
    if run.has("trajectory", settings):
        return
    sampler, solution = make_sampler(), exact()
    whiten = whitening(solution, 1.0)
    unit = _mean_squares(solution).mean() / _mean_squares(whiten(solution)).mean()

    def compute(numbers: range) -> Tensor:
        difference = draws.sample(sampler, numbers, run.batch_size).cpu() - solution[numbers.start : numbers.stop]
        errors = _mean_squares(difference), unit * _mean_squares(whiten(difference))
        assert sampler.evaluations is not None  # of these images
        return torch.stack([*errors, sampler.evaluations.double()], dim=1)

    parts = run.rows("trajectory", settings, len(draws.seeds), 3, compute)

    def find() -> dict[str, Any]:
        *errors, evaluations = parts.all().T.astype(float)
        numbers = [_root_mean(name, error) for name, error in zip(("error", "whitened error"), errors, strict=True)]
        steps = {"solution steps": sampler.config.num_train_timesteps, "evaluations": float(evaluations.mean())}
        return {"images": len(draws.seeds), **steps, **numbers[0], **numbers[1]}

    run.record("trajectory", settings, parts, find)


def exact_images(run: EvaluationRun, model: UNet, guide: UNet | None, draws: SampleSet, identity: list[Any]) -> Tensor:
    """(N, C, H, W) float32: the images of DDIM in all training timesteps. They take long and are kept in the user's cache.

    Args:
        model, guide: as of :class:`ddim_fast.Sampler`.
        identity: the weights and draws that decide the images.
    """
    shape, steps, count = model.config.image_shape, model.config.num_train_timesteps, len(draws.seeds)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    parts = Shards(cache_folder() / "solutions" / key, count, shape[0] * shape[1] * shape[2], run.batch_size)
    sampler = Sampler(model, steps=steps, spacing="linear", guide=guide)
    with alone(parts, run.processes), run.progress(f"{steps} steps", count) as bar:
        make_shards(
            parts,
            lambda numbers: draws.sample(sampler, numbers, run.batch_size).cpu().flatten(1),
            run.processes,
            bar,
        )
    return torch.from_numpy(parts.all()).reshape(count, *shape)


def _quality(run: EvaluationRun, parts: Shards, network: FeatureNetwork, reference: Reference) -> dict[str, Any]:
    run.say(f"comparing the features of {parts.count:,} images with the reference's")
    label = fid_label(parts.count)
    fid = frechet_distance(reference.statistics, parts.statistics(network.features))
    images = "unknown number of" if reference.images is None else f"{reference.images:,}"
    found: dict[str, Any] = {"images": parts.count, "reference images": f"{images} images", "label": label, label: fid}
    if reference.pictures:
        found["reference pictures"] = reference.pictures
    if reference.features is None:
        return found | {"not measured": f"KID, precision and recall: {reference.spec} holds only statistics"}
    features = parts.some(KEPT_FEATURES)[:, : network.features]
    many = min(len(features), len(reference.features))  # equal numbers of images, on which precision and recall depend
    if many <= 3:
        return found | {"not measured": f"KID, precision and recall: they need more than 3 images a side; there are {many}"}
    kid = kernel_distance(features, reference.features)
    pr = precision_recall(drawn(features, many), drawn(reference.features, many))
    return found | {
        "KID": kid.value,
        "KID standard error": kid.standard_error,
        "precision": pr.precision,
        "recall": pr.recall,
    }


def _mean_squares(x: Tensor) -> Tensor:
    """(N,) float64 from (N, C, H, W)."""
    return x.double().square().mean(dim=(1, 2, 3))


def _mean(name: str, values: np.ndarray) -> dict[str, Any]:
    values = values.astype(float)
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {name: float(values.mean()), f"{name} standard error": error}


def _root_mean(name: str, values: np.ndarray) -> dict[str, Any]:
    """The root of the mean and its standard error: the mean's, times the derivative of the root."""
    mean = _mean(name, values)
    root, error = mean[name] ** 0.5, mean[f"{name} standard error"]
    return {name: root, f"{name} standard error": error / (2 * root) if error is not None and root else error}
