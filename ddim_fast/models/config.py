"""The configuration of a network and its diffusion process, stored as config.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .class_names import named_classes, similar_name
from .json_dataclass import JsonDataclass

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ADVICE", "BETA_SCHEDULES", "PREDICTION_TYPES", "AutoencoderConfig", "DiffusionModel", "UNetConfig", "preset_names"]

BETA_SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# Fields of a UNetConfig for people; they do not change a network's output.
ADVICE = ("class_names", "guidance")

# More names are unreadable in one line.
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class UNetConfig(JsonDataclass):
    """The U-Net of DDPM (Ho et al. 2020, appendix B) and the process it denoises. The defaults fit the published DDPM and DDIM
    weights; fields with the same meaning have the names of diffusers' configs.

    Network:
        sample_size: height and width of the images, in pixels: one number for squares, or a pair. Both are multiples of
            2**(levels - 1), except that a height of 1 makes the network one-dimensional: then convolutions are 1x3, and levels
            halve the width alone.
        in_channels: channels of the images and of the output.
        base_channels: width C of the first level.
        channel_multipliers: the width of level i is ``C * channel_multipliers[i]``; each level halves the resolution.
        layers_per_block: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: the widths at which each residual block is followed by self-attention.
        attention_head_dim: channels per head, or None for a single head.
        dropout: probability, inside the residual blocks, in training only.
        norm_num_groups, norm_eps: of every GroupNorm.
        flip_sin_to_cos, freq_shift: the layout of the sinusoidal time embedding.
        downsample_padding: 1 pads symmetrically before the stride-2 convolution; 0 pads right and bottom only, as DDPM does.
        num_classes: number of class labels, or None for an unconditional network. One more row of the class embedding is the
            null class, which stands for "no label" in classifier-free guidance (Ho and Salimans 2022).
        class_names: the names of the classes, in the order of their numbers, or None: see :meth:`class_numbers`.

    Process:
        prediction_type: the network's output: ``epsilon``, ``v_prediction`` or ``sample``.
        beta_schedule, beta_start, beta_end, num_train_timesteps, rescale_betas_zero_snr: see
            :class:`ddim_fast.NoiseSchedule`.
        guidance: the best scale of classifier-free guidance, the default of ``python -m ddim_fast.sample``; None is no
            guidance.

    Raises:
        ValueError: a field has an impossible value; the message names the field.
    """

    sample_size: int | tuple[int, int]
    in_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 2)
    layers_per_block: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    attention_head_dim: int | None = None
    dropout: float = 0.1
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    flip_sin_to_cos: bool = False
    freq_shift: float = 1.0
    downsample_padding: int = 0
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    prediction_type: str = "epsilon"
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    num_train_timesteps: int = 1000
    rescale_betas_zero_snr: bool = False
    guidance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width = self.size
        if height == width:
            object.__setattr__(self, "sample_size", height)
        self._require(min(height, width) >= 1, "sample_size", "at least 1")
        self._require_positive("in_channels", "num_train_timesteps")
        _check_levels(self)
        self._require(0 <= self.dropout < 1, "dropout", "in [0, 1)")
        self._require(self.downsample_padding in (0, 1), "downsample_padding", "0 or 1")
        self._require(self.num_classes is None or self.num_classes >= 1, "num_classes", "at least 1, or null")
        names = self.class_names
        right = f"a different name for each of the {self.num_classes or 0} classes, or null"
        self._require(names is None or len(names) == len(set(names)) == self.num_classes, "class_names", right)
        self._require(self.guidance is None or self.num_classes is not None, "guidance", "null without classes")
        self._require(self.guidance is None or self.guidance >= 1, "guidance", "at least 1, or null")
        for name, choices in (("prediction_type", PREDICTION_TYPES), ("beta_schedule", BETA_SCHEDULES)):
            self._require(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        for name in ("beta_start", "beta_end"):
            self._require(0 < getattr(self, name) < 1, name, "between 0 and 1")
        # The frequencies of the time embedding are spread over this difference.
        self._require(self.freq_shift != self.base_channels // 2, "freq_shift", "other than half of base_channels")
        self._require(self.num_train_timesteps <= 10**6, "num_train_timesteps", "at most a million")
        halvings = 2 ** (len(self.channel_multipliers) - 1)
        self._require(
            width % halvings == 0 and (self.one_dimensional or height % halvings == 0),
            "sample_size",
            f"a multiple of {halvings}, for {len(self.channel_multipliers)} levels",
        )
        if self.attention_head_dim is not None:
            _check_divisor(self, "attention_head_dim")

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level, from the full resolution down."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (self.in_channels, *self.size)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of one image."""
        return self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size, self.sample_size)

    @property
    def one_dimensional(self) -> bool:
        """Whether images are signals along their width."""
        return self.size[0] == 1

    def level_size(self, level: int) -> tuple[int, int]:
        """(height, width) of the images at a level; level 0 is the full resolution."""
        height, width = self.size
        return (1 if self.one_dimensional else height // 2**level, width // 2**level)

    def attends(self, level: int) -> bool:
        """Whether self-attention follows the residual blocks of a level."""
        return self.level_size(level)[1] in self.attention_resolutions

    def class_numbers(self, text: str) -> list[int]:
        """The classes that ``text`` means: the class of this name, or all with it as a part, as "7/jackson" has "7" and
        "jackson"; without such a name, the class of this number. Case does not matter.

        Raises:
            ValueError: it means no class of the network; the message lists the classes.
        """
        if self.num_classes is None:
            raise ValueError("the network is unconditional: it has no classes")
        names = self.class_names or ()
        found = named_classes(text, names)
        if found:
            return found
        number = text.strip()
        if not (number.isascii() and number.isdecimal()):
            close = similar_name(text, names)
            hint = f"did you mean {close!r}? There" if close else "there"
            raise ValueError(f"no class is called {text!r}; {hint} are {self._classes()}")
        if len(number) > 9 or int(number) >= self.num_classes:
            raise ValueError(f"class {number} is out of range: the network has classes 0..{self.num_classes - 1}")
        return [int(number)]

    def class_number(self, text: str) -> int:
        """The only class of :meth:`class_numbers`.

        Raises:
            ValueError: ``text`` means no class, or several; the message names them.
        """
        found = self.class_numbers(text)
        if len(found) > 1:
            names = ", ".join((self.class_names or ())[number] for number in found)
            raise ValueError(f"{text!r} means {len(found)} classes; name one of {names}")
        return found[0]

    def _classes(self) -> str:
        """The classes, for a message."""
        if self.class_names is None:
            return f"classes 0..{(self.num_classes or 0) - 1}, without names"
        more = len(self.class_names) - _SHOWN
        return ", ".join(self.class_names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> UNetConfig:
        """A named configuration, with any field replaced by ``overrides``.

        Raises:
            ValueError: no preset has that name, or no field has an override's name.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(_PRESETS)}")
        return cls.from_dict({**_PRESETS[name], **overrides})


class DiffusionModel(Protocol):
    """A diffusion network: :class:`ddim_fast.UNet`, or any ``nn.Module`` with the same config attributes and call."""

    @property
    def config(self) -> UNetConfig: ...

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None, /) -> Tensor: ...

    def eval(self) -> DiffusionModel: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(JsonDataclass):
    """The small convolutional autoencoder of :class:`ddim_fast.Autoencoder`.

    Attributes:
        sample_size: height and width of the images, in pixels; a multiple of 2**(levels - 1).
        in_channels: image channels.
        latent_channels: channels of the latents, whose sides are smaller by 2**(levels - 1).
        base_channels: width C of the first level.
        channel_multipliers: the width of level i is ``C * channel_multipliers[i]``; each level halves the resolution.
        layers_per_block: residual blocks per level.
        norm_num_groups, norm_eps: of every GroupNorm.

    Raises:
        ValueError: a field has an impossible value; the message names the field.
    """

    sample_size: int
    in_channels: int = 3
    latent_channels: int = 4
    base_channels: int = 32
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("sample_size", "in_channels", "latent_channels")
        _check_levels(self)
        right = f"a multiple of {self.factor}, for {len(self.channel_multipliers)} levels"
        self._require(self.sample_size % self.factor == 0, "sample_size", right)

    @property
    def factor(self) -> int:
        """Pixels of the image per latent, along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Width of each level, from the full resolution down."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (self.in_channels, self.sample_size, self.sample_size)


def _check_levels(config: UNetConfig | AutoencoderConfig) -> None:
    """Check the fields of both networks' levels. A damaged file must not use up the machine's memory, or hours."""
    config._require_positive("base_channels", "layers_per_block", "norm_num_groups")
    multipliers = config.channel_multipliers
    config._require(bool(multipliers) and min(multipliers) >= 1, "channel_multipliers", "one positive integer per level")
    config._require(config.norm_eps > 0, "norm_eps", "positive")
    is_small = max(config.level_channels) <= 2**16
    config._require(is_small, "base_channels", f"such that no level has more than {2**16} channels")
    layers = config.layers_per_block * len(multipliers)
    config._require(layers <= 512, "layers_per_block", "at most 512 in all levels together")
    _check_divisor(config, "norm_num_groups")


def _check_divisor(config: UNetConfig | AutoencoderConfig, name: str) -> None:
    number = getattr(config, name)
    for width in config.level_channels:
        holds = number >= 1 and width % number == 0
        config._require(holds, name, f"a divisor of every level's width, {width} among them")


_PRESETS: dict[str, dict[str, Any]] = {
    "cifar10-64": {"sample_size": 32, "base_channels": 64},
    "cifar10-128": {"sample_size": 32},
    "celeba-64": {"sample_size": 64, "channel_multipliers": (1, 2, 2, 2, 4)},
    "celebahq-256": {"sample_size": 256, "channel_multipliers": (1, 1, 2, 2, 4, 4), "dropout": 0.0},
    "grey-32": {
        "sample_size": 32,
        "in_channels": 1,
        "base_channels": 32,
        "channel_multipliers": (1, 2, 4),
        "attention_resolutions": (8,),
        "norm_num_groups": 8,
        "dropout": 0.0,
    },
    # Presets of sounds, described by AudioConfig.preset: spectrograms, and waveforms.
    "digits-mel": {
        "sample_size": 16,
        "in_channels": 16,
        "base_channels": 64,
        "channel_multipliers": (1, 2, 2),
        "layers_per_block": 1,
        "attention_resolutions": (8,),
        "norm_num_groups": 8,
    },
    "digits-waveform": {
        "sample_size": (1, 512),
        "in_channels": 16,
        "base_channels": 64,
        "channel_multipliers": (1, 2, 2, 2),
        "layers_per_block": 1,
        "attention_resolutions": (64,),
        "norm_num_groups": 8,
    },
}


def preset_names() -> tuple[str, ...]:
    """The names of :meth:`UNetConfig.preset`."""
    return tuple(_PRESETS)
