"""Checkpoint folders of diffusers: a ``UNet2DModel``, or a ``DDPMPipeline`` or ``DDIMPipeline`` with one and its scheduler.
Neither loading nor saving needs diffusers itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ...io.files import atomic_folder, errors_name_file, read_json, write_json
from ..config import UNetConfig
from ..weights import Checkpoint, read_weights, write_weights

__all__ = ["fold_class", "is_diffusers", "load_diffusers", "save_diffusers"]

_T = TypeVar("_T")

_WEIGHTS = "diffusion_pytorch_model"

# The defaults of UNet2DModel for options that its config.json lacks (diffusers 0.42).
_UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# Options of UNet2DModel that UNetConfig has under the same name.
_SAME_NAME = (
    "in_channels",
    "layers_per_block",
    "attention_head_dim",
    "dropout",
    "norm_num_groups",
    "norm_eps",
    "flip_sin_to_cos",
    "freq_shift",
    "downsample_padding",
)

# Options of diffusers' schedulers that describe the training process. The others describe sampling.
_PROCESS = ("prediction_type", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr")
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def is_diffusers(folder: Path) -> bool:
    """Whether diffusers wrote ``folder``.

    Raises:
        FileNotFoundError: ``folder`` is no checkpoint.
        ValueError: its config.json is damaged.
    """
    return (folder / "model_index.json").is_file() or "_class_name" in read_json(folder / "config.json")


def load_diffusers(folder: Path) -> Checkpoint:
    """Load a ``UNet2DModel``, from its own folder or from a pipeline's.

    The schedule and the prediction type are those of the pipeline's scheduler; without one, the network predicts epsilon on the
    linear schedule of DDPM. The last class of a class-conditional network becomes the null class of :class:`UNetConfig`,
    because diffusers has none. Weights may be .safetensors or .bin, in one file or several, with the present or the old names
    of the attention layers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the network has an option that :class:`ddim_fast.UNet` lacks; the message names the
            file and the key.
    """
    index = folder / "model_index.json"
    is_pipeline = index.is_file()
    if is_pipeline:
        _parse(index, _check_pipeline)
    unet = _component(folder, "unet") if is_pipeline else folder
    config = _parse(unet / "config.json", lambda values: UNetConfig(**_network_fields(values)))
    if is_pipeline:
        scheduler = _component(folder, "scheduler") / "scheduler_config.json"
        config = _parse(scheduler, lambda values: dataclasses.replace(config, **_process_fields(values)))
    path, tensors = read_weights(unet, _WEIGHTS, (".safetensors", ".bin"))
    has_old_names = any(name.endswith(".query.weight") for name in tensors)
    return Checkpoint(path, config, tensors, _old_name if has_old_names else str)


def save_diffusers(folder: Path, config: UNetConfig, state: dict[str, Tensor]) -> None:
    """Write a folder that ``diffusers.DDIMPipeline.from_pretrained`` loads, whole or not at all.

    A class-conditional network becomes a ``UNet2DModel`` with one more class, the null class, which means no label. A
    ``DDIMPipeline`` gives its network no labels; see :func:`fold_class`. The scheduler does not clip, like
    :class:`ddim_fast.Sampler`.

    Args:
        folder: new, or empty.
        config: the network.
        state: its tensors, by the names of :class:`ddim_fast.UNet`, which are those of diffusers.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: diffusers' UNet2DModel cannot be this network, or its DDIMScheduler lacks the schedule.
    """
    unet, scheduler = _unet_options(config), _scheduler_options(config)
    with atomic_folder(folder) as new:
        for name in ("unet", "scheduler"):
            (new / name).mkdir()
        write_weights(new / "unet", _WEIGHTS, state)
        write_json(new / "unet" / "config.json", {"_class_name": "UNet2DModel", **unet})
        write_json(new / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **scheduler})
        components = {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
        write_json(new / "model_index.json", {"_class_name": "DDIMPipeline", **components})


def fold_class(config: UNetConfig, state: dict[str, Tensor], label: int | None) -> tuple[UNetConfig, dict[str, Tensor]]:
    """A class-conditional network restricted to one label: an unconditional network with the class embedding added to the bias
    of its time embedding.

    Args:
        label: the class, or None for the null class.

    Raises:
        ValueError: the network is unconditional, or has no such class.
    """
    if config.num_classes is None:
        raise ValueError("the network is unconditional: it has no classes")
    if label is not None and not 0 <= label < config.num_classes:
        raise ValueError(f"class {label} is out of range: the network has classes 0..{config.num_classes - 1}")
    embedding = state["class_embedding.weight"][config.num_classes if label is None else label]
    folded = {name: tensor for name, tensor in state.items() if name != "class_embedding.weight"}
    folded["time_embedding.linear_2.bias"] = folded["time_embedding.linear_2.bias"] + embedding
    return dataclasses.replace(config, num_classes=None, class_names=None, guidance=None), folded


def _parse(path: Path, convert: Callable[[dict[str, Any]], _T]) -> _T:
    """``convert`` of a JSON file; its ValueErrors name the file."""
    values = read_json(path)
    with errors_name_file(path):
        return convert(values)


def _component(folder: Path, name: str) -> Path:
    """The folder of a pipeline's component; the oldest pipelines have all their files in one."""
    return folder / name if (folder / name).is_dir() else folder


def _check_pipeline(index: dict[str, Any]) -> None:
    components = sorted(name for name, value in index.items() if isinstance(value, list))
    if components != ["scheduler", "unet"]:
        raise ValueError(f"the pipeline has {', '.join(components) or 'no components'}; give one with scheduler and unet only")


def _network_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of UNetConfig that describe the network of a ``UNet2DModel``'s config.json."""
    _require(values, "_class_name", ["UNet2DModel"])
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    for key in sorted(given.keys() - _UNET_DEFAULTS.keys()):
        raise ValueError(f"{key} = {given[key]!r} is unknown; it may change the network")
    options = {**_UNET_DEFAULTS, **given}

    widths, blocks = options["block_out_channels"], options["down_block_types"]
    if not (isinstance(widths, list) and widths and all(type(w) is int and w > 0 and w % widths[0] == 0 for w in widths)):
        raise ValueError(f"block_out_channels must be multiples of the first; got {widths!r}")
    attention = {"DownBlock2D": False, "AttnDownBlock2D": True}
    if not (isinstance(blocks, list) and len(blocks) == len(widths) and all(b in list(attention) for b in blocks)):
        raise ValueError(
            f"down_block_types must be one of {', '.join(attention)} for each of block_out_channels; got {blocks!r}"
        )
    attends = [attention[block] for block in blocks]
    size = options["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if type(size) is not int:
        raise ValueError(f"sample_size must be the height and width of square images; got {size!r}")

    possible = {
        "out_channels": [options["in_channels"]],
        "center_input_sample": [False],
        "time_embedding_type": ["positional"],
        "time_embedding_dim": [None, 4 * widths[0]],
        "mid_block_type": ["UNetMidBlock2D"],
        "up_block_types": [["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]],
        "mid_block_scale_factor": [1],
        "downsample_type": ["conv"],
        "upsample_type": ["conv"],
        "act_fn": ["silu", "swish"],
        "attn_norm_num_groups": [None, options["norm_num_groups"]],
        "resnet_time_scale_shift": ["default"],
        "add_attention": [True],
        "class_embed_type": [None],
    }
    for key, choices in possible.items():
        _require(options, key, choices)
    classes = options["num_class_embeds"]
    if classes is not None and not (type(classes) is int and classes >= 2):
        raise ValueError(f"num_class_embeds must be at least 2, the last class meaning no label; got {classes!r}")

    return {
        "sample_size": size,
        "base_channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "attention_resolutions": [size // 2**i for i, attends_here in enumerate(attends) if attends_here],
        "num_classes": None if classes is None else classes - 1,
        **{key: options[key] for key in _SAME_NAME},
    }


def _process_fields(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The fields of UNetConfig that describe the process of a scheduler_config.json."""
    _require(scheduler, "beta_schedule", list(_BETA_SCHEDULES))
    if scheduler.get("trained_betas") is not None:
        raise ValueError("trained_betas: the schedule must be given by beta_schedule, not as a list of betas")
    fields = {key: scheduler[key] for key in _PROCESS if key in scheduler}
    if scheduler.get("predict_epsilon") is False:  # an older name of prediction_type="sample"
        fields.setdefault("prediction_type", "sample")
    return {**fields, "beta_schedule": _BETA_SCHEDULES[scheduler["beta_schedule"]]}


def _unet_options(config: UNetConfig) -> dict[str, Any]:
    """The options of the ``UNet2DModel`` that is ``config``'s network; :func:`_network_fields` is the inverse."""
    if config.channel_multipliers[0] != 1:
        raise ValueError(
            f"channel_multipliers must begin with 1 for a UNet2DModel, which embeds timesteps in as many channels as its first "
            f"level has; got {list(config.channel_multipliers)}"
        )
    if not isinstance(config.sample_size, int):
        raise ValueError(f"sample_size must be one number, of square images, for a UNet2DModel; got {config.sample_size}")
    attends = [config.attends(level) for level in range(len(config.level_channels))]
    return {
        **_UNET_DEFAULTS,
        **{key: getattr(config, key) for key in _SAME_NAME},
        "freq_shift": int(config.freq_shift) if config.freq_shift.is_integer() else config.freq_shift,
        "sample_size": config.sample_size,
        "out_channels": config.in_channels,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "block_out_channels": list(config.level_channels),
        "num_class_embeds": None if config.num_classes is None else config.num_classes + 1,
    }


def _scheduler_options(config: UNetConfig) -> dict[str, Any]:
    """The options of the ``DDIMScheduler`` of ``config``'s process; :func:`_process_fields` is the inverse."""
    if config.beta_schedule == "sigmoid":
        raise ValueError("beta_schedule 'sigmoid': diffusers' DDIMScheduler has no such schedule")
    names = {ours: theirs for theirs, ours in _BETA_SCHEDULES.items()}
    return {
        **{key: getattr(config, key) for key in _PROCESS},
        "beta_schedule": names[config.beta_schedule],
        "clip_sample": False,
        # Sampling must start where no signal is left (Lin et al. 2024, section 3.3); leading timesteps do not.
        "timestep_spacing": "trailing" if config.rescale_betas_zero_snr else "leading",
    }


def _require(options: dict[str, Any], key: str, choices: list[Any]) -> None:
    if key not in options:
        raise ValueError(f"it lacks {key!r}")
    if options[key] not in choices:
        raise ValueError(f"{key} must be {' or '.join(repr(choice) for choice in choices)}; got {options[key]!r}")


def _old_name(name: str) -> str:
    """The name of an attention layer's tensor in older versions of diffusers."""
    for new, old in _ATTENTION_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name
