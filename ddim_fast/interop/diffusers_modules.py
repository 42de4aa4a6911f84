"""Subclasses of the modules of diffusers' networks that compute with the operators of this package.

A subclass adds nothing that would be saved. :func:`adopt` and :func:`give_back` change the ``__class__`` of a module alone, as
PyTorch's parametrizations do, so it stays the same object, with its parameters, buffers, children and hooks; no class of
diffusers or PyTorch is touched.

The subclasses are for inference. A module computes as its original class while a gradient is recorded, under autocast, which
has dtypes of its own, or if a child was replaced or hooked (LoRA).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..models.unet_blocks import norm_silu
from ..ops import torch_private
from ..ops.attention import attention
from ..ops.conv1x1 import conv1x1
from ..ops.conv3x3 import conv3x3_cached
from ..ops.torch_private import is_transformed
from ..ops.weight_cache import converted, forget

__all__ = [
    "FAST",
    "CastInputs",
    "CastMask",
    "FastAttnProcessor",
    "FastConv2d",
    "FastGroupNorm",
    "FastGroupNormSiLU",
    "FastLayerNorm",
    "FastLinear",
    "FastResnetBlock2D",
    "FastUpsample2D",
    "FusedSiLU",
    "adopt",
    "conv_of",
    "give_back",
    "is_conv3x3",
    "is_untouched",
    "why_not_attention",
    "why_not_resnet",
    "why_not_upsample",
]


def _checks_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class decorator: ``forward`` calls that of the module's present class. Hooks of offloading and layerwise casting keep
    the bound method of an adopted module and still call it after :func:`give_back`."""
    forward = kind.forward

    @functools.wraps(forward)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, kind) else type(self).forward)(self, *args, **kwargs)

    kind.forward = checked
    return kind


@_checks_class
class FastConv2d(nn.Conv2d):
    """A convolution in channels_last, in the dtype given to :func:`adopt`."""

    # Defaults, for layers that LoRA creates of an adopted layer's class.
    _fast_dtype: torch.dtype | None = None
    _fast_is_last = False

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is not FastConv2d or not _pads_zeros(self) or _needs_original(x, self.weight, self.bias):
            forget(self.weight)
            return super().forward(x.to(self.weight.dtype))
        dtype = compute_dtype(self)
        x = x.to(dtype, memory_format=torch.channels_last)
        if is_conv3x3(self):
            out = conv3x3_cached(x, self.weight, self.bias)
        else:
            bias = None if self.bias is None else self.bias.to(dtype)
            weight = converted(self.weight, dtype)
            out = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        # Images of one channel count as both layouts; a convolution would return the other one.
        out = out.contiguous(memory_format=torch.channels_last)
        return out.to(self.weight.dtype).contiguous() if self._fast_is_last else out


@_checks_class
class FastLinear(nn.Linear):
    """A linear layer in the dtype given to :func:`adopt`."""

    _fast_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is not FastLinear or _needs_original(x, self.weight, self.bias):
            forget(self.weight)
            return super().forward(x.to(self.weight.dtype))
        dtype = compute_dtype(self)
        return F.linear(x.to(dtype), converted(self.weight, dtype), None if self.bias is None else self.bias.to(dtype))


@_checks_class
class FastLayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if _needs_original(x, self.weight, self.bias):
            return super().forward(x.to(self.weight.dtype))
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@_checks_class
class FastGroupNorm(nn.GroupNorm):
    """A group norm, of images by :func:`group_norm_silu`."""

    def forward(self, x: Tensor) -> Tensor:
        x = _norm_input(self, x)
        if x.ndim == 4:
            return norm_silu(self, x, silu=False)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


@_checks_class
class FastGroupNormSiLU(nn.GroupNorm):
    """A group norm and the SiLU after it in one pass; the norm alone if the SiLU was replaced or one of the two has hooks.

    Attributes:
        _fast_parent: the module whose ``conv_norm_out`` this is, in a tuple, so that it is not registered as a child.
    """

    _fast_parent: tuple[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        act: Any = getattr(self._fast_parent[0], "conv_act", None)
        silu = is_untouched(self) and is_untouched(act, FusedSiLU)
        out: Any = norm_silu(self, _norm_input(self, x), silu=silu)
        if silu:
            out._fast_silu = True
        return out


@_checks_class
class FusedSiLU(nn.SiLU):
    """SiLU; tensors that :class:`FastGroupNormSiLU` has marked as activated pass unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(x, "_fast_silu", False):
            return super().forward(x)
        x._fast_silu = False  # type: ignore[attr-defined]
        return x


@_checks_class
class FastResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]
    """A residual block as two norms and two convolutions, fused with the first bias, the time embedding, both SiLUs, the
    shortcut's bias and the sum."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._is_served(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = input_tensor.to(compute_dtype(self.conv1))
        h = conv3x3_cached(norm_silu(self.norm1, x), self.conv1.weight)
        modulation = {"pre_shift": self.conv1.bias}
        if temb is not None:
            embedded = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            if self.time_embedding_norm == "default":
                modulation["pre_shift"] = _sum_biases(embedded, self.conv1.bias)
            else:
                modulation["scale"], modulation["shift"] = embedded.chunk(2, dim=1)
        rows = {name: values.expand(len(x), -1) for name, values in modulation.items() if values is not None}
        h = self.dropout(norm_silu(self.norm2, h, **rows))
        shortcut, bias = self.conv_shortcut, self.conv2.bias
        if shortcut is None:
            residual = x
        else:
            residual = conv1x1(x, converted(shortcut.weight, x.dtype))
            bias = _sum_biases(bias, shortcut.bias)
        out = conv3x3_cached(h, self.conv2.weight, bias, residual=residual)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def _is_served(self, x: Tensor, temb: Tensor | None) -> bool:
        """Whether the block is unchanged since its adoption, takes this embedding, and no gradient is recorded."""
        if (temb is None) != (self.time_emb_proj is None):
            return False  # mostly an error that diffusers raises
        if (self.time_embedding_norm == "scale_shift") if temb is None else (self.time_embedding_norm not in _EMBEDDINGS):
            return False
        return why_not_resnet(self) is None and not _needs_original(x, temb, *_parameters(self))


# Added to the images before the second norm, or their scale and shift after it.
_EMBEDDINGS = ("default", "scale_shift")


@_checks_class
class FastUpsample2D(Upsample2D):  # type: ignore[misc]
    """Nearest-neighbour upsampling inside the convolution, which never writes the large image."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        doubled = tuple(2 * size for size in hidden_states.shape[2:])
        served = (output_size is None or tuple(output_size) == doubled) and why_not_upsample(self) is None
        conv = conv_of(self) if served else None
        if args or kwargs or conv is None or _needs_original(hidden_states, conv.weight, conv.bias):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return conv3x3_cached(hidden_states.to(compute_dtype(conv)), conv.weight, conv.bias, upsample=True)


class FastAttnProcessor(AttnProcessor2_0):  # type: ignore[misc]
    """Attention, and the norm before it, by the operators of this package.

    Args:
        original: the replaced processor, which still serves the other calls.
        dtype: the network's dtype of computation, if it was given one.
    """

    def __init__(self, original: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # Adapters construct processors of the present class without arguments.
        self.original = AttnProcessor2_0() if original is None else original
        self.dtype = dtype

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        is_image = hidden_states.ndim == 4
        normed = attn.group_norm is not None
        # In a network with a dtype, projections that record a gradient compute in their own dtype.
        needs_original = self.dtype is None and _needs_original(hidden_states, encoder_hidden_states, *_parameters(attn))
        served = not normed or (is_image and is_untouched(attn.group_norm, FastGroupNorm))
        if needs_original or args or kwargs or not served or why_not_attention(attn, self.original) is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        tokens = norm_silu(attn.group_norm, hidden_states, silu=False) if normed else hidden_states
        if is_image:
            tokens = tokens.flatten(2).transpose(1, 2)
        others = tokens if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(tokens), attn.to_k(others), attn.to_v(others))
        q, k, v = (p.to(projected[0].dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in projected)
        scale = attn.scale if type(self.original) is AttnProcessor else None  # AttnProcessor2_0 ignores it
        if attention_mask is None:
            out = attention(q, k, v, scale=scale)
        else:
            mask = attn.prepare_attention_mask(attention_mask, k.shape[2], len(k)).unflatten(0, (len(k), attn.heads))
            mask = mask.to(q.dtype) if mask.is_floating_point() else mask
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
        if is_image:
            out = out.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


class CastInputs:
    """A forward pre-hook that converts inputs to the module's own dtype, for a module left alone in a network of another
    dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return torch_private.tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


class CastMask:
    """A forward pre-hook that converts attention masks to the dtype of the network, whatever the processor."""

    def __call__(self, attn: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask, query = kwargs.get("attention_mask"), getattr(attn.to_q, "base_layer", attn.to_q)
        x = args[0] if args else kwargs["hidden_states"]
        if mask is None or not mask.is_floating_point() or not isinstance(query, FastLinear):
            return args, kwargs
        if _needs_original(x, query.weight, query.bias):
            return args, kwargs
        return args, kwargs | {"attention_mask": mask.to(compute_dtype(query))}


# The original class of each subclass.
FAST: dict[type[nn.Module], type[nn.Module]] = {
    FastConv2d: nn.Conv2d,
    FastLinear: nn.Linear,
    FastLayerNorm: nn.LayerNorm,
    FastGroupNorm: nn.GroupNorm,
    FastGroupNormSiLU: nn.GroupNorm,
    FusedSiLU: nn.SiLU,
    FastResnetBlock2D: ResnetBlock2D,
    FastUpsample2D: Upsample2D,
}


def adopt(module: nn.Module, kind: type[nn.Module], dtype: torch.dtype | None = None, *, is_last: bool = False) -> None:
    """Change the class of ``module`` to its subclass ``kind``.

    Args:
        dtype: its dtype of computation; None is its weight's.
        is_last: whether it is the last convolution of a network. It then returns its weight's dtype, contiguous like the
            sample, because a scheduler's step takes a single pass only over tensors of one layout.
    """
    module.__class__ = kind
    vars(module).update(_fast_dtype=dtype, _fast_is_last=is_last)


def give_back(module: nn.Module) -> None:
    """Undo :func:`adopt`; other modules are unchanged."""
    kind = type(module)
    if kind in FAST:
        module.__class__ = FAST[kind]
    elif is_parametrized(module) and kind.__bases__[0] in FAST:
        # A parametrization derived its class from ours. Copies of the module may share that class, so it is not changed.
        before = FAST[kind.__bases__[0]]
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{before.__name__}", (before,), body)
    for name in ("_fast_dtype", "_fast_is_last", "_fast_parent"):
        vars(module).pop(name, None)


def compute_dtype(module: FastConv2d | FastLinear) -> torch.dtype:
    """The dtype of an adopted module's computation."""
    return module._fast_dtype or module.weight.dtype


def why_not_resnet(block: ResnetBlock2D) -> str | None:
    """The reason why a residual block cannot be computed without calling its parts, or None. Checked at every call: any part
    may have been replaced since."""
    if block.upsample is not None or block.downsample is not None:
        return "it resamples between norm and convolution"
    act, shortcut = block.nonlinearity, block.conv_shortcut
    if type(act) is not nn.SiLU:
        return f"its nonlinearity is {type(act).__name__}, not SiLU"
    if not (is_untouched(act) and is_untouched(block.norm1, FastGroupNorm) and is_untouched(block.norm2, FastGroupNorm)):
        return _CHANGED
    if not all(is_untouched(conv, FastConv2d) and is_conv3x3(conv) for conv in (block.conv1, block.conv2)):
        return _CHANGED
    return None if shortcut is None or (is_untouched(shortcut, FastConv2d) and _is_conv1x1(shortcut)) else _CHANGED


_CHANGED = "a norm or convolution in it is left alone, of another shape, or hooked"


def why_not_upsample(block: Upsample2D) -> str | None:
    """The reason why an Upsample2D cannot be computed without calling its convolution, or None; checked at every call."""
    if (
        block.use_conv
        and block.interpolate
        and not block.use_conv_transpose
        and block.norm is None
        and is_untouched(conv_of(block), FastConv2d)
        and is_conv3x3(conv_of(block))
    ):
        return None
    return "it is not nearest-neighbour upsampling before a 3x3 convolution"


def why_not_attention(attn: Attention, processor: Any) -> str | None:
    """The reason why :class:`FastAttnProcessor` cannot take the place of ``processor``, or None; checked at every call."""
    kind = type(processor)
    if kind not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {kind.__name__}"
    if kind is AttnProcessor and (not attn.scale_qk or attn.upcast_attention or attn.upcast_softmax):
        return "its processor does not scale, or computes in float32"  # AttnProcessor2_0 knows neither
    # Options that the two processors ignore or do not have.
    for option in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim"):
        if getattr(attn, option) is not None:
            return f"it has {option}"
    return None


def conv_of(upsample: Upsample2D) -> Any:
    """The convolution of an Upsample2D, which has one of two names."""
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0


def is_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether :func:`conv3x3` computes this convolution."""
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _is_conv1x1(conv: nn.Conv2d) -> bool:
    shape = conv.kernel_size, conv.stride, conv.padding, conv.groups
    return shape == ((1, 1), (1, 1), (0, 0), 1)


def is_untouched(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether ``module`` has no foreign hooks, forward or padding, so that its call can be replaced; and whether its class is
    ``kind``, if given."""
    if kind is not None and type(module) is not kind:
        return False
    return not torch_private.has_hooks(module) and "forward" not in vars(module) and _pads_zeros(module)


def _pads_zeros(module: nn.Module) -> bool:
    """Whether a convolution pads with zeros; tiling ones are made by changing the attributes of an existing module."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and "_conv_forward" not in vars(module)


def _norm_input(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The input of an adopted norm, in the dtype in which it computes."""
    needs_original = norm.weight is not None and _needs_original(x, norm.weight, norm.bias)
    return x.to(norm.weight.dtype) if needs_original else x


def _sum_biases(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two biases; either may be None."""
    return b if a is None else a if b is None else a + b


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients may be recorded: none without grad mode."""
    return list(module.parameters()) if torch.is_grad_enabled() else []


def _needs_original(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a module must compute as its original class: a gradient is recorded, or autocast or a transform of torch.func is
    active on the device of ``x``."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return True
    return torch.is_autocast_enabled(x.device.type) or is_transformed()
