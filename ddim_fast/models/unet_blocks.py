"""The layers and blocks of :class:`ddim_fast.UNet`. They carry the names of diffusers' modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.add_bias import add_bias, adds_in_one_pass
from ..ops.attention import attention
from ..ops.capturing import is_traced
from ..ops.conv1x1 import conv1x1
from ..ops.conv3x3 import Prepared, conv3x3, prepare_conv3x3
from ..ops.dispatch import Implementation, choose, why_not_triton
from ..ops.group_norm_silu import group_norm_silu
from ..ops.measured import is_faster_on_gpu
from ..ops.torch_private import is_observed
from .config import UNetConfig

__all__ = [
    "Attention",
    "Conv3x3",
    "Convolution",
    "Level",
    "MidBlock",
    "ResnetBlock",
    "TimeEmbedding",
    "batch_invariant",
    "module_list",
    "norm_silu",
    "same_size",
    "sinusoidal_embedding",
]

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> list[M]:
    """An ``nn.ModuleList`` with the type of its modules."""
    made: Any = nn.ModuleList(modules)
    return made


def sinusoidal_embedding(timesteps: Tensor, config: UNetConfig) -> Tensor:
    """sin | cos features of (N,) timesteps -> (N, base_channels), float32 (Vaswani et al. 2017, section 3.5)."""
    half = config.base_channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - config.freq_shift)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(10000) * exponent)[None, :]
    sin, cos = torch.sin(angles), torch.cos(angles)
    embedding = torch.cat([cos, sin] if config.flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, config.base_channels % 2))


def norm_silu(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    """:func:`group_norm_silu` with the parameters of ``norm``."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


def batch_invariant(operator: Callable[..., Tensor], *images: Tensor, owner: nn.Module | None = None) -> Tensor:
    """``operator`` on tensors of N images; a single image is the same to the last bit as in a batch.

    On a CPU, some of torch's convolutions sum in another order for a single image: small ones go to another library, and
    threads divide the image instead of the batch. In eager inference such an operator gets the image twice.

    Args:
        owner: the operator's module. Its attribute ``batch_invariant`` can switch this off; one test on noise per shape finds
            out whether the operator sums in another order. None always gives the image twice.
    """
    x = images[0]
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[0] != 1 or is_traced() or is_observed():
        return operator(*images)
    if owner is not None and not (getattr(owner, "batch_invariant", True) and _depends_on_batch(operator, images, owner)):
        return operator(*images)
    return operator(*(t.expand(2, -1, -1, -1) for t in images))[:1]


# The results of _depends_on_batch, by module and by argument shapes.
_batch_dependence: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], bool]] = WeakKeyDictionary()


def _depends_on_batch(operator: Callable[..., Tensor], images: tuple[Tensor, ...], owner: nn.Module) -> bool:
    """Whether ``operator`` sums in another order for one image than for two."""
    answers = _batch_dependence.setdefault(owner, {})
    key = (torch.get_num_threads(), *((t.shape, t.dtype) for t in images))
    if key not in answers:
        generator = torch.Generator().manual_seed(0)
        pair = [t.expand(2, -1, -1, -1).clone().normal_(generator=generator) for t in images]
        answers[key] = not torch.equal(operator(*(t[:1] for t in pair)), operator(*pair)[:1])
    return answers[key]


class RowLinear(nn.Linear):
    """A linear layer on (N, features) embeddings whose row i does not depend on N.

    BLAS chooses its kernel, and so the order of summation, by the number of rows. In eager inference on a CPU the rows are
    multiplied in blocks of a fixed size, so that an image is the same to the last bit in every batch. On a GPU other operators
    also depend on the batch, and blocks would only cost launches.
    """

    ROWS = 16

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        blocks = F.pad(x, (0, 0, 0, -len(x) % self.ROWS)).split(self.ROWS)
        return torch.cat([F.linear(block, self.weight, self.bias) for block in blocks])[: len(x)]


def same_size(config: UNetConfig) -> dict[str, Any]:
    """The options of a convolution that keeps the image's size: 3x3, or 1x3 in a one-dimensional network."""
    return {"kernel_size": (1, 3), "padding": (0, 1)} if config.one_dimensional else {"kernel_size": 3, "padding": 1}


class Convolution(nn.Conv2d):
    """A convolution whose bias is added by :func:`add_bias` where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        if not adds_in_one_pass(x):
            return super().forward(x)
        return add_bias(F.conv2d(x, self.weight, None, self.stride, self.padding), self.bias)


class Conv3x3(nn.Conv2d):
    """:func:`conv3x3` with its weight; :meth:`prepare` transforms the weight for inference."""

    bias: nn.Parameter

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, **same_size(config))
        self.prepared: Prepared | None = None

    def prepare(self, dtype: torch.dtype, limits: Tensor | None = None, *, size: tuple[int, int] | None = None) -> None:
        """:func:`prepare_conv3x3` for images in ``dtype``."""
        self.prepared = prepare_conv3x3(self.weight, dtype, limits, size=size)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None, upsample: bool = False
    ) -> Tensor:
        """Convolve with the given bias instead of the module's own; options as of :func:`conv3x3`."""

        def convolve(x: Tensor, residual: Tensor | None = None) -> Tensor:
            return conv3x3(x, self.weight, bias, residual=residual, upsample=upsample, prepared=self.prepared)

        images = (x,) if residual is None else (x, residual)
        return batch_invariant(convolve, *images, owner=self) if self.prepared is None else convolve(*images)


class TimeEmbedding(nn.Module):
    def __init__(self, channels: int, time_dim: int) -> None:
        super().__init__()
        self.linear_1 = RowLinear(channels, time_dim)
        self.linear_2 = RowLinear(time_dim, time_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class ResnetBlock(nn.Module):
    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, time_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, config.norm_eps)
        self.conv1 = Conv3x3(config, in_channels, out_channels)
        self.time_emb_proj = RowLinear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv3x3(config, out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, shift: Tensor, skip: Tensor | None = None) -> Tensor:
        """``shift``, (N, C), is the first convolution's bias and the block's share of the embedding. ``skip`` continues x along
        the channels, without a concatenation in memory."""
        h = self.conv1(norm_silu(self.norm1, x, skip=skip))
        h = self.dropout(norm_silu(self.norm2, h, pre_shift=shift))
        if self.conv_shortcut is None:
            return self.conv2(h, self.conv2.bias, residual=x if skip is None else torch.cat([x, skip], dim=1))
        weight, bias = self.conv_shortcut.weight, self.conv2.bias + self.conv_shortcut.bias  # type: ignore[operator]
        residual = conv1x1(x, weight[:, : x.shape[1]])
        if skip is not None:
            residual = conv1x1(skip, weight[:, x.shape[1] :], residual)
        return self.conv2(h, bias, residual=residual)


class Attention(nn.Module):
    """Self-attention over the H*W positions."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = 1 if config.attention_head_dim is None else channels // config.attention_head_dim
        self.group_norm = nn.GroupNorm(config.norm_num_groups, channels, config.norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k: nn.Linear | None = nn.Linear(channels, channels)
        self.to_v: nn.Linear | None = nn.Linear(channels, channels)
        self.to_out = module_list([nn.Linear(channels, channels)])

    def fold(self, dtype: torch.dtype) -> None:
        """Merge linear layers, for inference in ``dtype``: of one head the four into two, the tokens becoming keys and values;
        of several heads those of query, key and value into one, where that is faster.

        With one head, scores are q k^T = (x Wq^T + bq) Wk x^T + (a number for each query, which softmax ignores), and each row
        of the attention matrix P sums to 1. So the output P (x Wv^T + bv) Wo^T + bo is (P x) (Wo Wv)^T + Wo bv + bo.
        """
        if self.to_k is None or self.to_v is None:
            return
        if self.heads > 1:
            request = _Projections(self, dtype)
            choose("projections", PROJECTIONS, request).run(request)
            return
        wq, wk, wv, wo = (f.weight.double() for f in (self.to_q, self.to_k, self.to_v, self.to_out[0]))
        bq, bv, bo = (f.bias.double() for f in (self.to_q, self.to_v, self.to_out[0]))
        for linear, weight, bias in ((self.to_q, wk.T @ wq, wk.T @ bq), (self.to_out[0], wo @ wv, wo @ bv + bo)):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        self.to_k = self.to_v = None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = norm_silu(self.group_norm, x, silu=False).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self._project(tokens))
        attended = batch_invariant(attention, q, k, v, owner=self).transpose(1, 2).flatten(2)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, (height, width))

    def _project(self, tokens: Tensor) -> Sequence[Tensor]:
        """Query, key and value, each (N, H W, C); of one product they are views of it."""
        if self.to_k is not None and self.to_v is not None:
            return self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return (self.to_q(tokens), tokens, tokens) if self.heads == 1 else self.to_q(tokens).chunk(3, dim=2)


class _Projections(NamedTuple):
    """The request to choose between three linear layers and one: an attention of several heads, and its dtype in inference."""

    attention: Attention
    dtype: torch.dtype


def _why_not_joined(request: _Projections) -> str | None:
    return why_not_triton(request.attention.to_q.weight.device)


def _joined_are_faster(request: _Projections) -> bool:
    return is_faster_on_gpu("projections", request.attention.to_q.weight.device, request.dtype)


def _join(request: _Projections) -> None:
    """The layers of query, key and value become one, ``to_q``."""
    attention = request.attention
    layers: Any = (attention.to_q, attention.to_k, attention.to_v)
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(layer, name) for layer in layers])
        setattr(attention.to_q, name, nn.Parameter(joined, requires_grad=False))
    attention.to_q.out_features *= 3
    attention.to_k = attention.to_v = None


def _keep(request: _Projections) -> None:
    """The layers stay three."""


PROJECTIONS = (
    Implementation("triton", _join, _why_not_joined, _joined_are_faster),
    *(Implementation(backend, _keep, lambda request: None) for backend in ("native", "cuda", "reference")),
)


class Downsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        options = same_size(config)
        is_image = not config.one_dimensional
        # Padding right and bottom here, or on all sides in the convolution.
        self.pad = None if config.downsample_padding else (0, 1, 0, int(is_image))
        if self.pad is not None:
            options["padding"] = 0
        self.conv = Convolution(channels, channels, stride=(1 + is_image, 2), **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is None:
            return batch_invariant(self.conv, x, owner=self.conv)
        request = _Padded(self, x)
        if is_traced() or is_observed():
            return _pad(request)
        return choose("downsample", DOWNSAMPLING, request).run(request)


class _Padded(NamedTuple):
    """The request to choose between padding an image right and bottom before it is halved, and cropping the result."""

    downsample: Downsample
    image: Tensor


def _pad(request: _Padded) -> Tensor:
    downsample: Any = request.downsample
    return batch_invariant(downsample.conv, F.pad(request.image, downsample.pad), owner=downsample.conv)


def _crop(request: _Padded) -> Tensor:
    """The convolution pads by two on all sides, which copies nothing. It begins two pixels earlier, that is one output; the sum
    with the bias, a pass over the result in any case, leaves that row and column out."""

    def convolve(image: Tensor) -> Tensor:
        out = F.conv2d(image, conv.weight, None, conv.stride, (2 * down, 2))
        return out[:, :, down:, 1:] + bias.to(out.dtype)[:, None, None]

    conv: Any = request.downsample.conv
    down, bias = conv.weight.shape[2] // 2, conv.bias  # signals, images of height 1, are halved in their width alone
    return batch_invariant(convolve, request.image, owner=conv)


def _why_not_cropped(request: _Padded) -> str | None:
    return why_not_triton(request.image.device)


def _cropped_is_faster(request: _Padded) -> bool:
    return not torch.is_grad_enabled() and is_faster_on_gpu("downsample", request.image.device, request.image.dtype)


DOWNSAMPLING = (
    Implementation("triton", _crop, _why_not_cropped, _cropped_is_faster),
    *(Implementation(backend, _pad, lambda request: None) for backend in ("native", "cuda", "reference")),
)


class Upsample(nn.Module):
    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(config, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.conv.bias, upsample=True)


class Level(nn.Module):
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
        self.resnets = module_list(ResnetBlock(config, c, channels, time_dim) for c in in_channels)
        self.attentions = module_list(Attention(config, channels) for _ in in_channels) if has_attention else None
        down, up = resampler == "downsamplers", resampler == "upsamplers"
        self.downsamplers = module_list([Downsample(config, channels)]) if down else None
        self.upsamplers = module_list([Upsample(config, channels)]) if up else None

    def attend(self, i: int, h: Tensor) -> Tensor:
        """The attention after residual block ``i``, or None."""
        return h if self.attentions is None else self.attentions[i](h)


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, channels: int, time_dim: int) -> None:
        super().__init__()
        self.attentions = module_list([Attention(config, channels)])
        self.resnets = module_list(ResnetBlock(config, channels, channels, time_dim) for _ in range(2))

    def forward(self, x: Tensor, first_shift: Tensor, second_shift: Tensor) -> Tensor:
        h = self.attentions[0](self.resnets[0](x, first_shift))
        return self.resnets[1](h, second_shift)
