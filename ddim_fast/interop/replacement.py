"""The walk through a network of diffusers that gives its modules the classes of :mod:`ddim_fast.interop.diffusers_modules`."""

from __future__ import annotations

import threading
from itertools import chain
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ..ops import torch_private
from .diffusers_modules import (
    FAST,
    CastInputs,
    CastMask,
    FastAttnProcessor,
    FastConv2d,
    FastGroupNorm,
    FastGroupNormSiLU,
    FastLayerNorm,
    FastLinear,
    FastResnetBlock2D,
    FastUpsample2D,
    FusedSiLU,
    adopt,
    give_back,
    is_conv3x3,
    is_untouched,
    why_not_attention,
    why_not_resnet,
    why_not_upsample,
)
from .report import Accelerated, LeftAlone, Report

__all__ = ["DENOISERS", "AdoptReplacements", "adopt_model", "restore_module"]

DENOISERS = (UNet2DModel, UNet2DConditionModel)
# Only conv_act follows their conv_norm_out.
_WITH_OUTPUT_LAYERS = (*DENOISERS, Encoder, Decoder)

_SUBCLASS = "it is a class of its own"


def adopt_model(
    model: nn.Module, name: str, dtype: torch.dtype | None, report: Report, *, keep_processors: bool = False
) -> None:
    """Replace the classes of all supported modules of ``model``.

    Args:
        name: the model's name in its pipeline, for the report.
        dtype: the model's dtype of computation; None is its own.
        report: gets the replaced modules and those left alone.
        keep_processors: keep all attention processors.
    """
    _Walk(dtype, report, keep_processors).visit(model, name)
    if isinstance(model, DENOISERS) and type(model.conv_out) is FastConv2d:
        adopt(model.conv_out, FastConv2d, dtype, is_last=True)


def restore_module(module: nn.Module) -> None:
    """Undo :func:`adopt_model` for one module, except its attention processor."""
    give_back(module)
    torch_private.remove_pre_hooks(module, (CastInputs, CastMask))


class AdoptReplacements:
    """A forward pre-hook of a network with a ``dtype``. A layer or attention processor put in since the last call would not fit
    that dtype; the hook adapts it as if it had been there from the start.

    Args:
        model: the network.
        dtype: its dtype of computation.
    """

    # Held during a walk. The class owns it, because networks are copied with their hooks and locks cannot be copied.
    _lock = threading.Lock()

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._remember()

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and self._last != self._parts():
            with self._lock:
                if self._last != self._parts():  # unless another thread has done it
                    self._adopt()

    def _parts(self) -> list[Any]:
        """All modules and processors; fast, because it runs at every call."""
        return [*chain.from_iterable(map(dict.values, self._children)), *(attn.processor for attn in self._attentions)]

    def _adopt(self) -> None:
        modules = list(self.model.modules())
        # An adopted layer takes any input when LoRA wraps it, and may be unwrapped again.
        wrapped = {getattr(module, "base_layer", None) for module in modules}
        for module in modules:
            if module not in wrapped:
                restore_module(module)
        adopt_model(self.model, "", self.dtype, Report(""), keep_processors=True)
        own = vars(self.model)
        own["_fast_modules"] = list(dict.fromkeys([*own["_fast_modules"], *self.model.modules()]))
        self._remember()

    def _remember(self) -> None:
        modules = list(self.model.modules())
        self._children = [torch_private.children_of(module) for module in modules]
        self._attentions = [module for module in modules if isinstance(module, Attention)]
        self._last = self._parts()


class _Walk:
    """The arguments of :func:`adopt_model`, and its recursion."""

    def __init__(self, dtype: torch.dtype | None, report: Report, keep_processors: bool) -> None:
        self.dtype = dtype
        self.report = report
        self.keep_processors = keep_processors

    def visit(self, module: nn.Module, name: str) -> None:
        if isinstance(module, (TimestepEmbedding, nn.Embedding)) or type(module) in FAST:
            return  # small and exact, or adopted before under another name
        reason = _why_closed(module)
        if reason is None and type(module) in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GroupNorm):
            self._layer(module, name)
            return
        if reason is None and any(True for _ in module.parameters(recurse=False)):
            reason = "it is none of the supported classes"
        if reason is None and isinstance(module, Attention) and self.dtype is not None:
            reason = _why_not_projections(module)
        if reason is not None:
            self._leave(module, name, reason)
            return
        for child_name, child in module.named_children():
            if isinstance(module, ResnetBlock2D) and child_name == "time_emb_proj":
                continue  # small and exact
            path = _join(name, child_name)
            if isinstance(module, DENOISERS) and child_name == "conv_out" and type(child) is not nn.Conv2d:
                self._leave(child, path, "it returns the network's output and is not a convolution")
            else:
                self.visit(child, path)
        if isinstance(module, ResnetBlock2D):
            reason = why_not_resnet(module) if type(module) is ResnetBlock2D else _SUBCLASS
            self._block(module, FastResnetBlock2D, name, "group_norm_silu, conv3x3", reason)
        elif isinstance(module, Upsample2D):
            reason = why_not_upsample(module) if type(module) is Upsample2D else _SUBCLASS
            self._block(module, FastUpsample2D, name, "conv3x3", reason)
        elif isinstance(module, Attention):
            self._attention(module, name)
        elif isinstance(module, _WITH_OUTPUT_LAYERS):
            self._output_norm(module, name)

    def _layer(self, layer: nn.Module, name: str) -> None:
        if isinstance(layer, nn.GroupNorm):
            self._adopt(layer, FastGroupNorm, name, "group_norm_silu")
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            self._leave(layer, name, f"its padding_mode is {layer.padding_mode}")
        elif isinstance(layer, nn.Conv2d):
            self._adopt(layer, FastConv2d, name, "conv3x3" if is_conv3x3(layer) else "PyTorch in channels_last")
        elif self.dtype is not None and layer.weight is not None:  # even the weights' own dtype: they may be converted later
            self._adopt(layer, FastLinear if isinstance(layer, nn.Linear) else FastLayerNorm, name, f"PyTorch in {self.dtype}")

    def _block(self, block: nn.Module, kind: type[nn.Module], name: str, by: str, reason: str | None) -> None:
        if reason is None:
            self._adopt(block, kind, name, by)
        else:
            self._report_left(block, name, reason)

    def _attention(self, attn: Attention, name: str) -> None:
        if self.dtype is not None:
            attn.register_forward_pre_hook(CastMask(), with_kwargs=True)
        if self.keep_processors:
            return
        reason = why_not_attention(attn, attn.processor) if type(attn) is Attention else _SUBCLASS
        if reason is not None:
            self._report_left(attn, name, reason)
            return
        attn.set_processor(FastAttnProcessor(attn.processor, self.dtype))
        self.report.replaced.append(Accelerated(name, "Attention", "attention"))

    def _output_norm(self, module: nn.Module, name: str) -> None:
        """Fuse the norm before the last convolution with its SiLU."""
        norm, act = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if norm is None or type(act) is not nn.SiLU or not is_untouched(norm, FastGroupNorm) or not is_untouched(act):
            return
        adopt(norm, FastGroupNormSiLU)
        norm._fast_parent = (module,)
        self._adopt(act, FusedSiLU, _join(name, "conv_act"), "group_norm_silu")

    def _adopt(self, module: nn.Module, kind: type[nn.Module], name: str, by: str) -> None:
        self.report.replaced.append(Accelerated(name, FAST[kind].__name__, by))
        adopt(module, kind, self.dtype)

    def _report_left(self, module: nn.Module, name: str, why: str) -> None:
        self.report.left_alone.append(LeftAlone(name, type(module).__name__, why))

    def _leave(self, module: nn.Module, name: str, why: str) -> None:
        """Leave a module and its children alone. In a network of another dtype, its inputs are converted to its own."""
        self._report_left(module, name, why)
        dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
        if self.dtype is None or not dtypes or self.dtype in dtypes:
            return
        layer: nn.Module | None = module
        while layer is not None and type(layer) not in FAST:  # a layer that LoRA wraps may be unwrapped again
            layer.register_forward_pre_hook(CastInputs(max(dtypes, key=lambda d: d.itemsize)), with_kwargs=True)
            layer = getattr(layer, "base_layer", None)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _why_closed(module: nn.Module) -> str | None:
    """The reason why nothing in a module may be replaced, or None."""
    if hasattr(module, "base_layer"):
        return "it is LoRA-wrapped"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward is not the class's own (a hook)"
    if hasattr(module, "parametrizations"):
        return "its weights are parametrized"
    for parameter in module.parameters(recurse=False):
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return "its weights are quantised"
    return None


def _why_not_projections(attn: Attention) -> str | None:
    """The reason why the projections of attention may not compute in another dtype, or None: another processor would combine
    their results with weights of its own dtype."""
    processor = attn.processor.original if isinstance(attn.processor, FastAttnProcessor) else attn.processor
    if _has_other_weights(processor):
        return f"its processor, {type(processor).__name__}, has weights of its own"
    if why_not_attention(attn, processor) is None:
        return None
    parts = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "norm_cross")
    return next((f"its {name} is left alone" for name in parts if _has_other_weights(getattr(attn, name, None))), None)


def _has_other_weights(part: Any) -> bool:
    """Whether a part of attention has weights that are left alone: in a module, weights outside the supported layers; in
    another object, which the walk does not enter, any weights."""
    if isinstance(part, nn.Module):
        return any(_why_closed(m) is not None or _is_unknown(m) for m in part.modules())
    leaves = torch_private.tree_leaves(vars(part)) if hasattr(part, "__dict__") else []
    return any(isinstance(leaf, (torch.Tensor, nn.Module)) for leaf in leaves)


def _is_unknown(module: nn.Module) -> bool:
    """Whether a module has weights and is not a supported layer."""
    return type(module) not in FAST.values() and any(True for _ in chain(module.parameters(False), module.buffers(False)))
