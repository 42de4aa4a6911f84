"""The U-Net of DDPM and DDIM (Ho et al. 2020, appendix B; Song et al. 2021), optionally class-conditional.

Modules and parameters carry the names of diffusers' ``UNet2DModel``, so published DDPM weights load as they are.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.group_norm_silu import group_norm_silu
from .checkpoint import load_checkpoint, resolve_model, save_checkpoint
from .config import UNetConfig

__all__ = ["UNet"]

_MODEL_CARD = """\
---
{{ card_data }}
---

A diffusion U-Net saved by ddim_fast. `UNet.from_pretrained(FOLDER)` loads it;
`python -m ddim_fast.sample --model FOLDER` samples from it.
"""


class UNet(nn.Module, ModelHubMixin, library_name="ddim_fast", tags=["diffusion", "ddim"], model_card_template=_MODEL_CARD):
    """eps(x_t, t), or v or x_0 as ``config.prediction_type`` says.

    Args:
        config: the architecture, see :class:`UNetConfig`.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise ValueError(f"UNet takes a UNetConfig, for example UNetConfig.preset('cifar10-64'); got {config!r}")
        self.config = config
        widths = config.level_channels
        time_dim = 4 * config.base_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = _TimeEmbedding(config.base_channels, time_dim)
        if config.num_classes is not None:
            self.class_embedding = nn.Embedding(config.num_classes + 1, time_dim)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            inputs = [channels] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(
                _Level(config, inputs, width, time_dim, self._has_attention(level), None if last else "downsamplers")
            )
            skips += [width] * (config.layers_per_block + (not last))
            channels = width
        self.mid_block = _MidBlock(config, channels, time_dim)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            inputs = [skips.pop() + (channels if i == 0 else width) for i in range(config.layers_per_block + 1)]
            self.up_blocks.append(
                _Level(config, inputs, width, time_dim, self._has_attention(level), "upsamplers" if level else None)
            )
            channels = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)
        self._initialise()

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise (or v, or x_0) in ``x``.

        Args:
            x: (N, C, H, W) noisy images.
            timesteps: (N,) or 0-dim; the training timesteps, integers in [0, num_train_timesteps), of any number type.
            labels: (N,) int64 class labels, ``config.num_classes`` meaning "no label". None means no label for any image.

        Returns:
            (N, C, H, W) in the dtype of the network.
        """
        embedding = self.embed(timesteps, labels, x.shape[0])
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = block.attend(i, resnet(h, embedding))
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, embedding)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = block.attend(i, resnet(h, embedding, skips.pop()))
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return self.conv_out(_norm(self.conv_norm_out, h))

    def embed(self, timesteps: Tensor, labels: Tensor | None, batch: int) -> Tensor:
        """The (batch, 4 C) vector every residual block receives: time embedding plus class embedding."""
        if labels is not None and self.config.num_classes is None:
            raise ValueError("labels were given, but this network is unconditional")
        embedding = self.time_embedding(sinusoidal_embedding(timesteps.reshape(-1), self.config))
        embedding = embedding.expand(batch, -1)
        if self.config.num_classes is not None:
            null = torch.full((batch,), self.config.num_classes, device=embedding.device)
            embedding = embedding + self.class_embedding(null if labels is None else labels)
        return embedding

    def for_inference(self, dtype: torch.dtype) -> UNet:
        """A copy that computes images in ``dtype``, its weights converted and laid out (channels_last) once, where autocast
        converts them at each call. What is small and wants digits stays float32: embeddings, and the norms' parameters.

        Args:
            dtype: of the images it takes and returns: torch.float32, bfloat16 or float16.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype=dtype, memory_format=torch.channels_last)
            elif isinstance(module, _Attention):
                for linear in (module.to_q, module.to_k, module.to_v, module.to_out):
                    linear.to(dtype)
        return model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.conv_in.weight.dtype

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_options: Any) -> UNet:
        """Load a checkpoint, in eval mode, on the CPU, in float32.

        Args:
            pretrained_model_name_or_path: the name of a packaged model, a folder with config.json and model.safetensors,
                or a Hugging Face Hub id (``owner/name``; the only form that uses the network).
            hub_options: for a Hub id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            FileNotFoundError: there is no such model.
            ValueError: config.json or model.safetensors is damaged or does not belong to this architecture.
        """
        folder = Path(resolve_model(pretrained_model_name_or_path))
        if not folder.is_dir():
            folder = _download(str(folder), hub_options)
        config, state = load_checkpoint(folder)
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        path = folder / "model.safetensors"
        for name in sorted(expected.keys() ^ state.keys()):
            raise ValueError(f"{path}: {'missing' if name in expected else 'unexpected'} tensor {name!r}")
        for name, tensor in state.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, the network needs {expected[name]}")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(save_directory, self.config, self.state_dict())

    def _has_attention(self, level: int) -> bool:
        return self.config.sample_size // 2**level in self.config.attention_resolutions

    def _initialise(self) -> None:
        """Every residual branch and the output start at zero, so the network starts as the identity on its input's scale
        (Ho et al. 2020's code: init_scale = 0 for the last layer of each branch)."""
        for module in self.modules():
            if isinstance(module, (_ResnetBlock, _Attention)):
                last = module.conv2 if isinstance(module, _ResnetBlock) else module.to_out[0]
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        if self.config.num_classes is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)


def _download(model_id: str, hub_options: dict[str, Any]) -> Path:
    """A folder with the checkpoint of a Hub repository."""
    try:
        return Path(snapshot_download(model_id, allow_patterns=["config.json", "model.safetensors"], **hub_options))
    except Exception as error:  # the hub client raises its HTTP library's exceptions too; each means the same to the user
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"cannot get model {model_id!r} from the Hugging Face Hub: {reason}") from error


def sinusoidal_embedding(timesteps: Tensor, config: UNetConfig) -> Tensor:
    """sin | cos features of (N,) timesteps -> (N, base_channels), float32 (Vaswani et al. 2017, section 3.5)."""
    half = config.base_channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - config.freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponent)[None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    embedding = torch.cat([cos, sin] if config.flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, config.base_channels % 2))


def _norm(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    """GroupNorm and SiLU with the parameters of ``norm``, by the fastest implementation."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


class _RowLinear(nn.Linear):
    """A linear layer on (N, features) embeddings whose row i does not depend on N.

    BLAS chooses its kernel, and with it the order of summation, by the number of rows. In eager inference on a CPU the rows go
    through in blocks of one fixed size, so that an image is the same to the last bit in every batch. On a GPU, where other
    operators choose by the batch as well, the blocks would cost launches and promise nothing.
    """

    ROWS = 16

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        blocks = F.pad(x, (0, 0, 0, -len(x) % self.ROWS)).split(self.ROWS)
        return torch.cat([F.linear(block, self.weight, self.bias) for block in blocks])[: len(x)]


class _TimeEmbedding(nn.Module):
    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = _RowLinear(channels, time_dim)
        self.linear_2 = _RowLinear(time_dim, time_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class _ResnetBlock(nn.Module):
    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = _RowLinear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """``skip`` continues x along the channels; the concatenation is not made."""
        h = self.conv1(_norm(self.norm1, x, skip=skip))
        h = _norm(self.norm2, h, pre_shift=self.time_emb_proj(F.silu(embedding)))
        h = self.dropout(h)
        if self.conv_shortcut is None:
            return self.conv2(h) + (x if skip is None else torch.cat([x, skip], dim=1))
        weight = self.conv_shortcut.weight
        h = F.conv2d(h, self.conv2.weight, self.conv2.bias + self.conv_shortcut.bias, padding=1)
        h = _add_conv1x1(h, x, weight[:, : x.shape[1]])
        return h if skip is None else _add_conv1x1(h, skip, weight[:, x.shape[1] :])


def _add_conv1x1(h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``h`` and a 1x1 convolution of ``x``: in channels_last a matrix product that adds up in place of a pass of its own."""
    if not h.is_contiguous(memory_format=torch.channels_last):
        return h + F.conv2d(x, weight)
    n, channels, height, width = h.shape
    rows = torch.addmm(_rows(h), _rows(x), weight.flatten(1).t())
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C), a view of a channels_last image."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class _Attention(nn.Module):
    """Self-attention over the H*W positions."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = 1 if config.attention_head_dim is None else channels // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = _norm(self.group_norm, x, silu=False).flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, (height, width))


class _Downsample(nn.Module):
    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution, on the way down (``resampler='downsamplers'``) or up (``'upsamplers'``)."""

    def __init__(
        self,
        config: UNetConfig,
        in_channels: list[int],
        channels: int,
        time_dim: int,
        has_attention: bool,
        resampler: str | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_ResnetBlock(config, c, channels, time_dim) for c in in_channels)
        self.attentions = nn.ModuleList(_Attention(config, channels) for _ in in_channels) if has_attention else None
        down, up = resampler == "downsamplers", resampler == "upsamplers"
        self.downsamplers = nn.ModuleList([_Downsample(channels, config.downsample_padding)]) if down else None
        self.upsamplers = nn.ModuleList([_Upsample(channels)]) if up else None

    def attend(self, i: int, h: Tensor) -> Tensor:
        """The attention after residual block ``i``, where this level has any."""
        return h if self.attentions is None else self.attentions[i](h)


class _MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(config, channels)])
        self.resnets = nn.ModuleList(_ResnetBlock(config, channels, channels, time_dim) for _ in range(2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.attentions[0](self.resnets[0](x, embedding))
        return self.resnets[1](h, embedding)
