"""The public names, for type checkers and for ``__getattr__`` in __init__.py, which reads each line "from ... import NAME"."""

from .diffusion.denoiser import Denoiser as Denoiser
from .diffusion.fast_step import fast_ddim_step as fast_ddim_step
from .diffusion.latent import LatentSampler as LatentSampler
from .diffusion.sampler import Sampler as Sampler
from .diffusion.schedule import NoiseSchedule as NoiseSchedule
from .diffusion.step import coefficient_table as coefficient_table
from .diffusion.timesteps import select_timesteps as select_timesteps
from .diffusion.trajectory import SamplerState as SamplerState
from .interop.acceleration import accelerate as accelerate
from .interop.acceleration import unaccelerate as unaccelerate
from .io.pictures import save_images as save_images
from .io.pictures import to_pil as to_pil
from .models.autoencoder import Autoencoder as Autoencoder
from .models.config import AutoencoderConfig as AutoencoderConfig
from .models.config import UNetConfig as UNetConfig
from .models.unet import UNet as UNet
from .ops.attention import attention as attention
from .ops.ddim_step import ddim_step as ddim_step
from .ops.group_norm_silu import group_norm_silu as group_norm_silu
from .ops.noise import seeded_noise as seeded_noise

__version__: str
