"""The modules of diffusers' networks, computed by our operators.

Each class here is a subclass of the one whose place it takes, and adds nothing that would be saved: an object is moved from one
to the other by its ``__class__`` alone (see :func:`adopt` and :func:`give_back`), as PyTorch's parametrizations do it. So the
module stays the same object, with its parameters, buffers, children and hooks; no class of diffusers or PyTorch is touched.

What they compute, they compute for inference. Where a gradient is recorded, under autocast, which has dtypes of its own, or
where a child is no longer what it was (LoRA, a hook), a module does what the class does whose place it takes.
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

from ..ops import torch_private
from ..ops.attention import attention
from ..ops.conv1x1 import conv1x1
from ..ops.conv3x3 import conv3x3_cached
from ..ops.dispatch import is_transformed
from ..ops.group_norm_silu import group_norm_silu
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


def _while_adopted(kind: type[nn.Module]) -> type[nn.Module]:
    """Of a class below: its ``forward`` for modules that are of it no more. Hooks of offloading and layerwise casting keep the
    method that a module had when they came, and go on calling it when the module has been given back."""
    forward = kind.forward

    @functools.wraps(forward)
    def forward_of(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (forward if isinstance(self, kind) else type(self).forward)(self, *args, **kwargs)

    kind.forward = forward_of
    return kind


@_while_adopted
class FastConv2d(nn.Conv2d):
    """In channels_last, and in the dtype that :func:`adopt` was given."""

    # LoRA makes layers of its own of the class of the layer they stand beside.
    _fast_dtype: torch.dtype | None = None
    _fast_is_last = False

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is not FastConv2d or not _pads_zeros(self) or _is_as_before(x, self.weight, self.bias):
            forget_weight(self.weight)
            return super().forward(x.to(self.weight.dtype))
        dtype = compute_dtype(self)
        x = x.to(dtype, memory_format=torch.channels_last)
        if is_conv3x3(self):
            out = conv3x3_cached(x, self.weight, self.bias)
        else:
            bias = None if self.bias is None else self.bias.to(dtype)
            weight = converted(self.weight, dtype)
            out = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        # Images of one channel count as both layouts, and leave a convolution in the other one.
        out = out.contiguous(memory_format=torch.channels_last)
        return out.to(self.weight.dtype).contiguous() if self._fast_is_last else out


@_while_adopted
class FastLinear(nn.Linear):
    """In the dtype that :func:`adopt` was given."""

    _fast_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is not FastLinear or _is_as_before(x, self.weight, self.bias):
            forget_weight(self.weight)
            return super().forward(x.to(self.weight.dtype))
        dtype = compute_dtype(self)
        return F.linear(x.to(dtype), converted(self.weight, dtype), None if self.bias is None else self.bias.to(dtype))


@_while_adopted
class FastLayerNorm(nn.LayerNorm):
    """Of input whose dtype is not the parameters', in the input's."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_as_before(x, self.weight, self.bias):
            return super().forward(x.to(self.weight.dtype))
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@_while_adopted
class FastGroupNorm(nn.GroupNorm):
    """By our operator where there are images."""

    def forward(self, x: Tensor) -> Tensor:
        x = _of_norm(self, x)
        if x.ndim == 4:
            return norm_silu(self, x, silu=False)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


@_while_adopted
class FastGroupNormSiLU(nn.GroupNorm):
    """A norm and the SiLU after it, in one pass, for :class:`FusedSiLU` in the place of the SiLU. Where another activation has
    been put there, or somebody watches one of the two, the norm alone.

    Attributes:
        _fast_parent: the module whose ``conv_norm_out`` this is, in a tuple, so that it is no child.
    """

    def forward(self, x: Tensor) -> Tensor:
        silu = is_untouched(self) and self._is_followed()
        out = norm_silu(self, _of_norm(self, x), silu=silu)
        if silu:
            out._fast_silu = True
        return out

    def _is_followed(self) -> bool:
        act = getattr(self._fast_parent[0], "conv_act", None)
        return type(act) is FusedSiLU and is_untouched(act)


@_while_adopted
class FusedSiLU(nn.SiLU):
    """The SiLU of all but what :class:`FastGroupNormSiLU` says to have computed it of already."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(x, "_fast_silu", False):
            return super().forward(x)
        x._fast_silu = False
        return x


@_while_adopted
class FastResnetBlock2D(ResnetBlock2D):
    """A residual block in two norms and two convolutions: the first bias, the time embedding, both SiLUs, the shortcut's bias
    and the sum are done in passing."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not self._is_served(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = input_tensor.to(compute_dtype(self.conv1))
        h = conv3x3_cached(norm_silu(self.norm1, x), self.conv1.weight)
        numbers = {"pre_shift": self.conv1.bias}
        if temb is not None:
            embedded = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            if self.time_embedding_norm == "default":
                numbers["pre_shift"] = _sum(embedded, self.conv1.bias)
            else:
                numbers["scale"], numbers["shift"] = embedded.chunk(2, dim=1)
        rows = {name: values.expand(len(x), -1) for name, values in numbers.items() if values is not None}
        h = self.dropout(norm_silu(self.norm2, h, **rows))
        shortcut, bias = self.conv_shortcut, self.conv2.bias
        if shortcut is None:
            residual = x
        else:
            residual = conv1x1(x, converted(shortcut.weight, x.dtype))
            bias = _sum(bias, shortcut.bias)
        out = conv3x3_cached(h, self.conv2.weight, bias, residual=residual)
        return out if self.output_scale_factor == 1 else out / self.output_scale_factor

    def _is_served(self, x: Tensor, temb: Tensor | None) -> bool:
        """Whether the block is still what was adopted, the embedding is what it takes, and no gradient is asked for."""
        if (temb is None) != (self.time_emb_proj is None):
            return False  # an error mostly, which is theirs to raise
        if (self.time_embedding_norm == "scale_shift") if temb is None else (self.time_embedding_norm not in _EMBEDDED):
            return False
        return why_not_resnet(self) is None and not _is_as_before(x, temb, *_parameters(self))


# How an embedding goes into a block.
_EMBEDDED = ("default", "scale_shift")


@_while_adopted
class FastUpsample2D(Upsample2D):
    """Enlarged in the convolution, so that the large image is never written."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        doubled = tuple(2 * size for size in hidden_states.shape[2:])
        served = (output_size is None or tuple(output_size) == doubled) and why_not_upsample(self) is None
        conv = conv_of(self) if served else None
        if args or kwargs or not served or _is_as_before(hidden_states, conv.weight, conv.bias):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return conv3x3_cached(hidden_states.to(compute_dtype(conv)), conv.weight, conv.bias, upsample=True)


class FastAttnProcessor(AttnProcessor2_0):
    """Attention by our operator, and the norm before it.

    Attributes:
        original: the processor whose place it takes, and which serves what this one does not.
        dtype: that of the network, where it was given one.
    """

    def __init__(self, original: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # Adapters make processors of the class that they find, without arguments.
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
        # In a network with a dtype, projections that record a gradient are in another one than those that do not.
        as_before = self.dtype is None and _is_as_before(hidden_states, encoder_hidden_states, *_parameters(attn))
        served = not normed or (is_image and is_untouched(attn.group_norm, FastGroupNorm))
        if as_before or args or kwargs or not served or why_not_attention(attn, self.original) is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        tokens = norm_silu(attn.group_norm, hidden_states, silu=False) if normed else hidden_states
        if is_image:
            tokens = tokens.flatten(2).transpose(1, 2)
        others = tokens if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(tokens), attn.to_k(others), attn.to_v(others))
        q, k, v = (p.to(projected[0].dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in projected)
        scale = attn.scale if type(self.original) is AttnProcessor else None  # the other one does not look at it
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
    """A forward pre-hook for a module that is left alone in a network of another dtype: it gets its input in its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return torch_private.tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


class CastMask:
    """A forward pre-hook for attention in a network of another dtype: whatever its processor, the mask it is given is added to
    products of that dtype."""

    def __call__(self, attn: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask, query = kwargs.get("attention_mask"), getattr(attn.to_q, "base_layer", attn.to_q)
        x = args[0] if args else kwargs["hidden_states"]
        if mask is None or not mask.is_floating_point() or not isinstance(query, FastLinear):
            return args, kwargs
        if _is_as_before(x, query.weight, query.bias):
            return args, kwargs
        return args, kwargs | {"attention_mask": mask.to(compute_dtype(query))}


# Of an adopted module: the class that it had.
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
    """Makes ``module``, of the class that ``kind`` takes the place of, one of ``kind``.

    Args:
        dtype: what it computes in; None is its weight's dtype.
        is_last: a network's last convolution returns what the network's caller expects: its weight's dtype, and, as the sample
            is contiguous, that layout, since only tensors of one layout go through a scheduler's step in a single pass.
    """
    module.__class__ = kind
    module._fast_dtype, module._fast_is_last = dtype, is_last


def give_back(module: nn.Module) -> None:
    """Makes an adopted module what it was, others stay what they are."""
    kind = type(module)
    if kind in FAST:
        module.__class__ = FAST[kind]
    elif is_parametrized(module) and kind.__bases__[0] in FAST:
        # Its class was made for it, and made of ours. Copies of the module may share it: so another one, not this one changed.
        before = FAST[kind.__bases__[0]]
        body = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(f"Parametrized{before.__name__}", (before,), body)
    for name in ("_fast_dtype", "_fast_is_last", "_fast_parent"):
        vars(module).pop(name, None)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What an adopted module computes in."""
    return module._fast_dtype or module.weight.dtype


def norm_silu(norm: nn.GroupNorm, x: Tensor, **options: Any) -> Tensor:
    """GroupNorm and SiLU with the parameters of ``norm``."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **options)


def why_not_resnet(block: ResnetBlock2D) -> str | None:
    """Why a residual block cannot be computed without calling its parts, or None. Asked at every call: any part may have been
    replaced since."""
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
    """Why an Upsample2D cannot be computed without calling its convolution, or None; asked at every call, too."""
    if (
        block.use_conv
        and block.interpolate
        and not block.use_conv_transpose
        and block.norm is None
        and is_untouched(conv_of(block), FastConv2d)
        and is_conv3x3(conv_of(block))
    ):
        return None
    return "it does not enlarge by repetition before a 3x3 convolution"


def why_not_attention(attn: Attention, processor: Any) -> str | None:
    """Why attention that ``processor`` is to compute cannot be computed by ours, or None; asked at every call, too."""
    kind = type(processor)
    if kind not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {kind.__name__}"
    if kind is AttnProcessor and (not attn.scale_qk or attn.upcast_attention or attn.upcast_softmax):
        return "its processor does not scale, or computes in float32"  # AttnProcessor2_0 knows neither
    # What the processors in question have no place for.
    for option in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim"):
        if getattr(attn, option) is not None:
            return f"it has {option}"
    return None


def conv_of(upsample: Upsample2D) -> nn.Module:
    """The convolution of an Upsample2D, which has two names for it."""
    return upsample.conv if upsample.name == "conv" else upsample.Conv2d_0


def is_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether it is one of those that our operator is for."""
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _is_conv1x1(conv: nn.Conv2d) -> bool:
    shape = conv.kernel_size, conv.stride, conv.padding, conv.groups
    return shape == ((1, 1), (1, 1), (0, 0), 1)


def is_untouched(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether nobody watches or changes what ``module`` does, so that it need not be called itself; and whether it is of just
    this ``kind``, if given."""
    if kind is not None and type(module) is not kind:
        return False
    return not torch_private.has_hooks(module) and "forward" not in vars(module) and _pads_zeros(module)


def forget_weight(weight: Tensor) -> None:
    """Drops what was made of a weight for inference; compiled code made nothing."""
    if not torch.compiler.is_compiling():
        forget(weight)


def _pads_zeros(module: nn.Module) -> bool:
    """Whether a convolution pads as ours do: others, such as tiling ones, are made by changing a module that is there."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and "_conv_forward" not in vars(module)


def _of_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The input of an adopted norm, in the dtype that it computes in."""
    as_before = norm.weight is not None and _is_as_before(x, norm.weight, norm.bias)
    return x.to(norm.weight.dtype) if as_before else x


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of biases, either of which there may not be."""
    return b if a is None else a if b is None else a + b


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """All whose gradients may be recorded."""
    return list(module.parameters()) if torch.is_grad_enabled() else []


def _is_as_before(*tensors: Tensor | None) -> bool:
    """Whether a module has to do what the class does whose place it takes: a gradient is recorded, or autocast or a transform
    of torch.func decides what is computed. The first tensor says on which device."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return torch.is_autocast_enabled(tensors[0].device.type) or is_transformed()
