"""ddim_fast: fast, checkable DDIM sampling.

Names are loaded when they are first used, so importing the package needs neither torch nor Triton nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusion.latent import LatentSampler
    from .diffusion.sampler import Sampler
    from .diffusion.schedule import NoiseSchedule
    from .diffusion.step import coefficient_table, fast_ddim_step
    from .diffusion.timesteps import select_timesteps
    from .diffusion.trajectory import SamplerState
    from .interop.acceleration import accelerate, unaccelerate
    from .models.autoencoder import Autoencoder
    from .models.config import AutoencoderConfig, UNetConfig
    from .models.unet import UNet
    from .ops.attention import attention
    from .ops.ddim_step import ddim_step
    from .ops.group_norm_silu import group_norm_silu
    from .ops.noise import seeded_noise

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "LatentSampler",
    "NoiseSchedule",
    "Sampler",
    "SamplerState",
    "UNet",
    "UNetConfig",
    "accelerate",
    "attention",
    "coefficient_table",
    "ddim_step",
    "fast_ddim_step",
    "group_norm_silu",
    "seeded_noise",
    "select_timesteps",
    "unaccelerate",
]

__version__ = "0.1.0"

_HOMES = {
    "Autoencoder": "models.autoencoder",
    "AutoencoderConfig": "models.config",
    "LatentSampler": "diffusion.latent",
    "NoiseSchedule": "diffusion.schedule",
    "Sampler": "diffusion.sampler",
    "SamplerState": "diffusion.trajectory",
    "UNet": "models.unet",
    "UNetConfig": "models.config",
    "accelerate": "interop.acceleration",
    "attention": "ops.attention",
    "coefficient_table": "diffusion.step",
    "ddim_step": "ops.ddim_step",
    "fast_ddim_step": "diffusion.step",
    "group_norm_silu": "ops.group_norm_silu",
    "seeded_noise": "ops.noise",
    "select_timesteps": "diffusion.timesteps",
    "unaccelerate": "interop.acceleration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ddim_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
