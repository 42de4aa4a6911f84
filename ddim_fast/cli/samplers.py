"""Models, samplers and their images from a command's options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..diffusion.timesteps import ADAPTIVE
from ..io.files import item_names
from ..models.checkpoint import AUTOENCODER, local_model, resolve_model
from ..models.checksum import weights_checksum
from .options import SamplerSettings, image_labels, usual_batch_size
from .parser import CommandParser, list_integers, parse_spacing
from .progress import notice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data.resizing import Resizer
    from ..diffusion.latent import LatentSampler
    from ..diffusion.sampler import Sampler
    from ..models.audio import AudioConfig
    from ..models.unet import UNet

    AnySampler = Sampler | LatentSampler

__all__ = [
    "AnySampler",
    "audio_of",
    "batch_size_of",
    "job_record",
    "load_labelled",
    "load_model",
    "load_sampler",
    "make_sampler",
    "pixel_model",
    "require_pictures",
    "select_dtype",
    "select_execution",
]


def select_dtype(name: str, compiled: bool, device: torch.device) -> torch.dtype:
    """The dtype of ``--dtype``; ``auto`` is bfloat16 for a compiled run on a device that is fast at it, otherwise float32."""
    import torch

    from ..ops.devices import bf16_is_fast

    if name == "auto":
        return torch.bfloat16 if compiled and bf16_is_fast(device) else torch.float32
    return getattr(torch, name)


def load_labelled(
    specs: Sequence[str], chosen: str | None, sampler: AnySampler, resizer: Resizer, option: str = "--class"
) -> tuple[Tensor, list[int] | None, list[str]]:
    """A command's images, their classes, and names for the results.

    Args:
        specs: data sets or image files, each as :func:`ddim_fast.data.images.load_images` takes one.
        chosen, option: as of :func:`image_labels`.
        sampler: its images' channels and classes count.
        resizer: resizes them to the sampler's images.

    Returns:
        (N, C, H, W) float32 in [-1, 1] of the sampler's images' size, N labels or None, and N names.

    Raises:
        FileNotFoundError, ValueError: as :func:`ddim_fast.data.images.load_images`.
    """
    import torch

    from ..data.images import load_images, to_unit_range

    config, channels = sampler.config, sampler.image_shape[0]
    options: dict[str, Any] = {
        "num_classes": config.num_classes,
        "class_names": config.class_names,
        "labelled": chosen is None and config.num_classes is not None,
        "resizer": resizer,
    }
    data = [load_images(spec, channels, resizer.size, **options) for spec in specs]
    images = torch.cat([to_unit_range(part.images) for part in data]).contiguous()
    own = [label for part in data for label in ([None] * len(part) if part.labels is None else part.labels.tolist())]
    names = item_names([place for part in data for place in part.places])
    return images, image_labels(chosen, own, config, option), names


def make_sampler(parser: CommandParser, settings: SamplerSettings) -> AnySampler:
    """The deterministic DDIM sampler of a command's settings."""
    with notice(f"loading {settings.model}", settings.quiet):
        from ..ops.devices import pick_device

        with parser.usage_errors():
            device = pick_device(settings.device)
        return load_sampler(
            parser,
            settings.model,
            device,
            steps=settings.steps,
            spacing=parse_spacing(settings.spacing),
            dtype=select_dtype(settings.dtype, settings.compile, device),
            engine=select_execution(settings.engine, settings.compile, device, settings.dtype),
        )


def select_execution(engine: str, compiled: bool, device: torch.device, dtype: str) -> str:
    """The engine that ``--engine`` names; ``auto`` is the fastest one with ``--compile``, for what ``--dtype`` names."""
    from ..engine import fastest_engine

    return fastest_engine(device, select_dtype(dtype, compiled, device)) if compiled and engine == "auto" else engine


def batch_size_of(settings: SamplerSettings, sampler: AnySampler) -> int:
    """Images per network call."""
    return settings.batch_size or usual_batch_size(sampler.device.type)


def load_model(parser: CommandParser, name: str) -> tuple[UNet, Path]:
    """The network of a checkpoint, and its folder or file."""
    from ..deploy.folder import is_export, is_plan
    from ..models.unet import UNet

    with parser.usage_errors():
        resolve_model(name)
    path = local_model(name)
    if is_export(path):
        parser.error(f"{name} is an export to ONNX; sample it with python -m ddim_fast.sample --engine onnx")
    if is_plan(path):
        parser.error(f"{name} is an export to a plan; sample it with python -m ddim_fast.sample --engine plan")
    return UNet.from_pretrained(path), path


def load_sampler(
    parser: CommandParser, name: str, device: torch.device, guide: str | None = None, **options: Any
) -> AnySampler:
    """The sampler of a checkpoint, in latent space if an autoencoder lies beside it.

    Args:
        name: the model, as of ``--model``.
        guide: the name of the guide, or None.
        options: of :class:`ddim_fast.Sampler`.
    """
    from ..diffusion.latent import LatentSampler
    from ..diffusion.sampler import Sampler
    from ..interop.autoencoder import load_autoencoder
    from ..ops.serving import require_backend

    model, folder = load_model(parser, name)
    if guide is not None:
        options["guide"] = load_model(parser, guide)[0].to(device)
    with parser.usage_errors():
        sampler = Sampler(model.to(device), **options)
        require_backend(device, sampler.dtype)
    if not (folder / AUTOENCODER).is_dir():
        return sampler
    return LatentSampler(sampler, load_autoencoder(folder / AUTOENCODER))


def audio_of(sampler: AnySampler) -> AudioConfig | None:
    """The sound format of a sampler's images; None for pictures."""
    return getattr(sampler.model, "audio", None)


def require_pictures(parser: CommandParser, name: str, sampler: AnySampler, instead: str) -> None:
    """A usage error where the images of model ``name`` are sounds.

    Args:
        instead: the command for sounds.
    """
    if audio_of(sampler) is not None:
        parser.error(f"--model {name} is a model of sounds, not of pictures: {instead}")


def pixel_model(parser: CommandParser, name: str, instead: str) -> Path:
    """The folder or file of a model that works on pixels; a usage error for a model of latents.

    Args:
        name: the model, as of ``--model``.
        instead: what to do with a model of latents.
    """
    with parser.usage_errors():
        resolve_model(name)
    path = local_model(name)
    if (path / AUTOENCODER).is_dir():
        parser.error(f"--model {name} is a model of an autoencoder's latents, not of images: {instead}")
    return path


def job_record(command: str, own: dict[str, Any], settings: SamplerSettings, sampler: AnySampler) -> dict[str, Any]:
    """The record of a job of :func:`make_sampler`'s sampler.

    Args:
        own: other settings that decide its result, by option.
    """
    import torch

    decisive = {
        **own,
        "model": f"sha256:{weights_checksum(*sampler.networks)}",
        "steps": settings.steps,
        # Timesteps may be fitted again, so the record keeps them.
        "spacing": list_integers(sampler.timesteps[::-1].tolist()) if settings.spacing == ADAPTIVE else settings.spacing,
        "guidance": settings.guidance,
        "batch-size": batch_size_of(settings, sampler),
        "engine": sampler.engine,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
    }
    made_with = {"model": settings.model, "ddim_fast": __version__, "torch": torch.__version__}
    return {"command": command, "settings": decisive, **made_with}
