"""The U-Net of DDPM and DDIM (Ho et al. 2020, appendix B; Song et al. 2021), optionally class-conditional.

Modules and parameters carry the names of diffusers' ``UNet2DModel``, so published DDPM weights load as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from ..ops.attention import attention
from ..ops.conv1x1 import conv1x1
from ..ops.conv3x3 import Prepared, conv3x3, prepare_conv3x3
from ..ops.dispatch import is_observed
from ..ops.group_norm_silu import group_norm_silu
from .audio import AudioConfig
from .checkpoint import load_audio, load_checkpoint, load_timesteps, local_model, save_checkpoint
from .config import UNetConfig

__all__ = ["UNet", "batch_invariant"]

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

    Attributes:
        fitted_timesteps: by solver and number, the timesteps that spacing ``adaptive`` samples with, where the checkpoint has
            some.
        audio: what its images mean as sound, where they do.
    """

    fitted_timesteps: dict[str, dict[int, list[int]]] | None = None
    audio: AudioConfig | None = None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise ValueError(f"UNet takes a UNetConfig, for example UNetConfig.preset('cifar10-64'); got {config!r}")
        self.config = config
        widths = config.level_channels
        time_dim = 4 * config.base_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], **_kernel(config))
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
                _Level(config, inputs, width, time_dim, config.attends(level), None if last else "downsamplers")
            )
            skips += [width] * (config.layers_per_block + (not last))
            channels = width
        self.mid_block = _MidBlock(config, channels, time_dim)
        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            inputs = [skips.pop() + (channels if i == 0 else width) for i in range(config.layers_per_block + 1)]
            self.up_blocks.append(
                _Level(config, inputs, width, time_dim, config.attends(level), "upsamplers" if level else None)
            )
            channels = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.conv_out = nn.Conv2d(channels, config.in_channels, **_kernel(config))
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
        return self.denoise(x, self.condition(timesteps, labels))

    def condition(self, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the network makes of a timestep and a class, which is all it needs to know of them: the numbers that each
        residual block adds to its channels. A sampler computes them once, for all its steps.

        Args:
            timesteps: (N,), or 0-dim for one timestep for all images.
            labels: (N,) int64 or None, as in :meth:`forward`; may be longer than a 0-dim or one-element ``timesteps``.

        Returns:
            (N, channels of all residual blocks), side by side in the order in which they run; N = 1 counts for all images.
        """
        embedding = self.time_embedding(sinusoidal_embedding(timesteps.reshape(-1), self.config))
        if self.config.num_classes is None:
            if labels is not None:
                raise ValueError("labels were given, but this network is unconditional")
        else:
            null = torch.full((embedding.shape[0],), self.config.num_classes, device=embedding.device)
            embedding = embedding + self.class_embedding(null if labels is None else labels)
        activated = F.silu(embedding)
        # The convolution before the addition leaves its bias to it.
        return torch.cat([resnet.time_emb_proj(activated) + resnet.conv1.bias for resnet in self._resnets()], dim=1)

    def denoise(self, x: Tensor, condition: Tensor) -> Tensor:
        """The network itself: :meth:`forward` with what :meth:`condition` returned."""
        return self.denoise_reusing(x, condition)[0]

    def denoise_reusing(self, x: Tensor, condition: Tensor, deep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The network in two parts, for samplers that compute the larger one in a few of their steps only: from step to step
        the deep features change less than what surrounds them (DeepCache: Ma, Fang and Wang 2024, arXiv 2312.00858).

        Outside are the first convolution, the last residual block, which takes that convolution's result as its skip, and the
        output layers: a tenth of the network. Deep is everything else. With all of the first level outside, a third of the
        network, the images of the packaged fashion-mnist were no better.

        Args:
            x: (N, C, H, W) noisy images.
            condition: as of :meth:`denoise`.
            deep: deep features of N images, such as an earlier call returned; None computes them.

        Returns:
            The prediction, as of :meth:`forward`; and the deep features, which the last residual block began with.
        """
        shifts = condition.expand(x.shape[0], -1).split([resnet.conv1.out_channels for resnet in self._resnets()], dim=1)
        skip = batch_invariant(self.conv_in, x, owner=self.conv_in)
        if deep is None:
            deep = self._deep_features(skip, shifts)
        last = self.up_blocks[-1]
        h = last.attend(-1, last.resnets[-1](deep, shifts[-1], skip))
        return batch_invariant(self.conv_out, _norm(self.conv_norm_out, h), owner=self.conv_out), deep

    def _deep_features(self, h: Tensor, shifts: tuple[Tensor, ...]) -> Tensor:
        """From the first convolution's result to all that comes before the last residual block."""
        shifts = iter(shifts)
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = block.attend(i, resnet(h, next(shifts)))
                skips.append(h)
            if block.downsamplers is not None:
                h = block.downsamplers[0](h)
                skips.append(h)
        h = self.mid_block(h, next(shifts), next(shifts))
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                if len(skips) > 1:  # the first one is left to the last residual block
                    h = block.attend(i, resnet(h, next(shifts), skips.pop()))
            if block.upsamplers is not None:
                h = block.upsamplers[0](h)
        return h

    def _resnets(self) -> Iterator[_ResnetBlock]:
        """The residual blocks in the order in which they run."""
        for _, block in self._levels():
            yield from block.resnets

    def _levels(self) -> Iterator[tuple[int, _Level | _MidBlock]]:
        """The blocks in the order in which they run, each with its level of resolution, the full one being 0."""
        last = len(self.down_blocks) - 1
        yield from enumerate(self.down_blocks)
        yield last, self.mid_block
        for i, block in enumerate(self.up_blocks):
            yield last - i, block

    def for_inference(self, dtype: torch.dtype, *, batch_invariant: bool = True) -> UNet:
        """A copy that computes images in ``dtype``, its weights converted and laid out once for the fastest operators, where
        autocast converts them at each call. What is small and wants digits stays float32: embeddings and the norms' parameters.

        Args:
            dtype: of the images it takes and returns: torch.float32, bfloat16 or float16.
            batch_invariant: whether an image alone shall be the same to the last bit as in a batch, in eager mode on a CPU.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        for module in model.modules():
            module.batch_invariant = batch_invariant
        for level, block in model._levels():
            for resnet in block.resnets:
                for convolution in (resnet.conv1, resnet.conv2):
                    convolution.prepare(dtype, size=self.config.level_size(level))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                if isinstance(module, Conv3x3) and module.prepared is None:
                    module.prepare(dtype)
                module.to(dtype=dtype, memory_format=torch.channels_last)
            elif isinstance(module, _Attention):
                module.fold()
                for linear in (module.to_q, module.to_k, module.to_v, module.to_out):
                    if linear is not None:
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
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, config: UNetConfig | None = None, **hub_options: Any
    ) -> UNet:
        """Load a checkpoint, in eval mode, on the CPU, in float32. Nothing in it is ever executed.

        Args:
            pretrained_model_name_or_path: the name of a packaged model; a folder with config.json and model.safetensors; a
                folder of diffusers, of a UNet2DModel, DDPMPipeline or DDIMPipeline; a ``.ckpt`` file of the DDIM authors' code;
                or a Hugging Face Hub id (``owner/name``; the only form that uses the network, and gets no pickles).
            config: the network in a ``.ckpt`` file, which does not describe it. None derives it from the tensors' shapes.
            hub_options: for a Hub id: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Raises:
            FileNotFoundError: there is no such model, or a file of it is missing.
            ValueError: a file is damaged or does not belong to this architecture; the message names the file and the tensor.
        """
        path = local_model(pretrained_model_name_or_path, **hub_options)
        checkpoint = load_checkpoint(path, config)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        model.load_state_dict(checkpoint.state_dict(shapes), assign=True)
        model.fitted_timesteps = load_timesteps(path, checkpoint.config.num_train_timesteps)
        model.audio = load_audio(path, checkpoint.config)
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_checkpoint(save_directory, self.config, self.state_dict(), self.audio)

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


def batch_invariant(operator: Callable[..., Tensor], *images: Tensor, owner: nn.Module | None = None) -> Tensor:
    """``operator`` on tensors of N images, in such a way that an image is the same to the last bit when it is alone.

    On a CPU, some of torch's convolutions sum in another order for a single image: small ones go to another library, and
    threads divide the image where they would divide the batch. In eager inference such an operator is given the image twice.

    Args:
        owner: the module that the operator belongs to, for its attribute ``batch_invariant``; and to find out once, on noise,
            whether this operator sums in another order at all. None always gives the image twice.
    """
    x = images[0]
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[0] != 1 or torch.compiler.is_compiling() or is_observed():
        return operator(*images)
    if owner is not None and not (getattr(owner, "batch_invariant", True) and _depends_on_batch(operator, images, owner)):
        return operator(*images)
    return operator(*(t.expand(2, -1, -1, -1) for t in images))[:1]


_dependent: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


def _depends_on_batch(operator: Callable[..., Tensor], images: tuple[Tensor, ...], owner: nn.Module) -> bool:
    """Whether ``operator`` sums in another order for one image than for two, found out once for each shape."""
    answers = _dependent.setdefault(owner, {})
    key = (torch.get_num_threads(), *((t.shape, t.dtype) for t in images))
    if key not in answers:
        generator = torch.Generator().manual_seed(0)
        pair = [t.expand(2, -1, -1, -1).clone().normal_(generator=generator) for t in images]
        answers[key] = not torch.equal(operator(*(t[:1] for t in pair)), operator(*pair)[:1])
    return answers[key]


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


def _kernel(config: UNetConfig) -> dict[str, Any]:
    """Of a convolution that keeps the image's size."""
    return {"kernel_size": (1, 3), "padding": (0, 1)} if config.one_dimensional else {"kernel_size": 3, "padding": 1}


class Conv3x3(nn.Conv2d):
    """With stride 1, and 1x3 in a one-dimensional network; a network for inference has its weights prepared."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, **_kernel(config))
        self.prepared: Prepared | None = None

    def prepare(self, dtype: torch.dtype, limits: Tensor | None = None, *, size: tuple[int, int] | None = None) -> None:
        """For images in ``dtype``; ``limits`` and ``size`` as of :func:`prepare_conv3x3`."""
        self.prepared = prepare_conv3x3(self.weight, dtype, limits, size=size)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, upsample: bool = False
    ) -> Tensor:
        """Without a bias but the one that is given; options as of :func:`conv3x3`."""

        def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return conv3x3(x, self.weight, bias, residual=residual, upsample=upsample, prepared=self.prepared)

        images = (x,) if residual is None else (x, residual)
        return batch_invariant(convolve, *images, owner=self) if self.prepared is None else convolve(*images)


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
        self.conv1 = Conv3x3(config, in_channels, out_channels)
        self.time_emb_proj = _RowLinear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv3x3(config, out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor, skip: Tensor | None = None) -> Tensor:
        """``shift``, (N, C), is the first convolution's bias and the block's share of the embedding. ``skip`` continues x along
        the channels; the concatenation is not made."""
        h = self.conv1(_norm(self.norm1, x, skip=skip))
        h = self.dropout(_norm(self.norm2, h, pre_shift=shift))
        if self.conv_shortcut is None:
            return self.conv2(h, self.conv2.bias, residual=x if skip is None else torch.cat([x, skip], dim=1))
        weight, bias = self.conv_shortcut.weight, self.conv2.bias + self.conv_shortcut.bias
        residual = conv1x1(x, weight[:, : x.shape[1]])
        if skip is not None:
            residual = conv1x1(skip, weight[:, x.shape[1] :], residual)
        return self.conv2(h, bias, residual=residual)


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

    def fold(self) -> None:
        """For inference with one head: the four linear layers become two, and the tokens are their own keys and values.

        Scores are q k^T = (x Wq^T + bq) Wk x^T + (a number for each query, which softmax ignores), and each row of the
        attention matrix P sums to 1, so that the output P (x Wv^T + bv) Wo^T + bo is (P x) (Wo Wv)^T + Wo bv + bo.
        """
        if self.heads > 1:
            return
        wq, wk, wv, wo = (f.weight.double() for f in (self.to_q, self.to_k, self.to_v, self.to_out[0]))
        bq, bv, bo = (f.bias.double() for f in (self.to_q, self.to_v, self.to_out[0]))
        for linear, weight, bias in ((self.to_q, wk.T @ wq, wk.T @ bq), (self.to_out[0], wo @ wv, wo @ bv + bo)):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        self.to_k = self.to_v = None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = _norm(self.group_norm, x, silu=False).flatten(2).transpose(1, 2)
        projections = (tokens if f is None else f(tokens) for f in (self.to_q, self.to_k, self.to_v))
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in projections)
        attended = batch_invariant(attention, q, k, v, owner=self).transpose(1, 2).flatten(2)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, (height, width))


class _Downsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        kernel = _kernel(config)
        rows = not config.one_dimensional
        # What is not padded on both sides is padded right and bottom only.
        self.after = (0, 0, 0, 0) if config.downsample_padding else (0, 1, 0, int(rows))
        padding = kernel["padding"] if config.downsample_padding else 0
        self.conv = nn.Conv2d(channels, channels, kernel["kernel_size"], stride=(1 + rows, 2), padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return batch_invariant(self.conv, F.pad(x, self.after) if any(self.after) else x, owner=self.conv)


class _Upsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.conv.bias, upsample=True)


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
        self.downsamplers = nn.ModuleList([_Downsample(config, channels)]) if down else None
        self.upsamplers = nn.ModuleList([_Upsample(config, channels)]) if up else None

    def attend(self, i: int, h: Tensor) -> Tensor:
        """The attention after residual block ``i``, where this level has any."""
        return h if self.attentions is None else self.attentions[i](h)


class _MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_Attention(config, channels)])
        self.resnets = nn.ModuleList(_ResnetBlock(config, channels, channels, time_dim) for _ in range(2))

    def forward(self, x: Tensor, first_shift: Tensor, second_shift: Tensor) -> Tensor:
        h = self.attentions[0](self.resnets[0](x, first_shift))
        return self.resnets[1](h, second_shift)
