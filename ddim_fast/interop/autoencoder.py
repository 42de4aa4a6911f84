"""Autoencoders of latent diffusion from a folder of this package or of diffusers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..io.files import errors_name_file, one_line, read_json
from ..models.autoencoder import Autoencoder
from ..models.weights import check_finite

__all__ = ["load_autoencoder"]

# A config cannot name code: only these classes of diffusers are loaded.
_DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny")


def load_autoencoder(folder: Path) -> nn.Module:
    """A :class:`ddim_fast.Autoencoder`, or diffusers' ``AutoencoderKL`` or ``AutoencoderTiny`` as its ``save_pretrained`` wrote
    it, on the CPU, in float32 and eval mode. Nothing in it is ever executed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, holds another kind of network, or diffusers is needed and not installed.
    """
    name = read_json(folder / "config.json").get("_class_name")
    if name is None:
        return Autoencoder.from_pretrained(folder)
    if name not in _DIFFUSERS:
        raise ValueError(f"{folder / 'config.json'}: {name!r} is not supported; use {' or '.join(_DIFFUSERS)}")
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"{folder} is an autoencoder of diffusers, which is not installed: pip install diffusers") from None
    try:
        autoencoder, found = getattr(diffusers, name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        # diffusers would leave them as they are drawn at random.
        for tensor in (*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]):
            raise ValueError(f"tensor {tensor!r} is missing, unexpected or of another shape")
    except Exception as error:  # diffusers also raises errors of its dependencies; all mean the same to the user
        raise ValueError(f"{folder}: not a whole {name} of diffusers ({one_line(error)}); copy or download it again") from None
    with errors_name_file(folder / "diffusion_pytorch_model.safetensors"):
        check_finite(autoencoder.state_dict())
    return autoencoder.eval()
