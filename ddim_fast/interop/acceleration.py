"""Other people's networks by our operators: one line before, one line after.

>>> report = ddim_fast.accelerate(pipe, dtype=torch.bfloat16)
>>> print(report)
>>> images = pipe(batch_size=8, num_inference_steps=20).images
>>> ddim_fast.unaccelerate(pipe)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..engine import ENGINES, select_engine
from ..models.unet import UNet
from ..ops.devices import keep_memory
from ..ops.weight_cache import forget
from .diffusers import FastDDIMInverseScheduler, FastDDIMScheduler
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

from diffusers import (  # isort: skip - the module above says what is wrong where diffusers is missing
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

__all__ = ["Accelerated", "LeftAlone", "Report", "accelerate", "unaccelerate"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DENOISERS = (UNet2DModel, UNet2DConditionModel)
# They make an image once, and what digits they lose is seen in it: accelerated in their own dtype.
_AUTOENCODERS = (AutoencoderKL, VQModel)
_SCHEDULERS = {DDIMScheduler: FastDDIMScheduler, DDIMInverseScheduler: FastDDIMInverseScheduler}
# Where nothing but conv_act follows conv_norm_out.
_WITH_OUTPUT_LAYERS = (*_DENOISERS, Encoder, Decoder)


@dataclass(frozen=True)
class Accelerated:
    """One thing replaced: its name in the model or pipeline, its class, and what computes it now."""

    name: str
    kind: str
    by: str


@dataclass(frozen=True)
class LeftAlone:
    """One thing not replaced: its name, its class, and why."""

    name: str
    kind: str
    why: str


@dataclass
class Report:
    """What :func:`accelerate` did; printed, a summary.

    Attributes:
        engine: how the network is executed.
        replaced, left_alone: in the order in which they were met.
    """

    engine: str
    replaced: list[Accelerated] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain dictionaries, lists and strings."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"accelerated {len(self.replaced)} modules, engine {self.engine}"]
        lines += _grouped("replaced", [(r.kind, r.by, r.name) for r in self.replaced], "by")
        lines += _grouped("left alone", [(r.kind, r.why, r.name) for r in self.left_alone], "because")
        return "\n".join(lines)


def accelerate(
    model_or_pipeline: nn.Module | DiffusionPipeline, *, dtype: torch.dtype | None = None, engine: str = "eager"
) -> Report:
    """Has a network of diffusers compute by the operators of this package, in place, until :func:`unaccelerate`.

    Replaced are residual blocks, norms with the SiLU after them, attention, convolutions with their layout (channels_last) and,
    in a pipeline, a DDIMScheduler or DDIMInverseScheduler. No weight is changed, moved or renamed: parameters, ``state_dict``,
    ``save_pretrained``, ``.to(...)``, LoRA and seeds are as before. What is made of the weights for inference is kept beside
    them, up to four times their memory, and made anew when they change (:func:`ddim_fast.ops.weight_cache.cached` says how that
    is noticed). No class of diffusers is touched.

    What cannot be served is left alone and reported: modules of other classes, LoRA-wrapped, quantised or parametrized ones,
    and models whose weights an offloading hook moves. Where a gradient is recorded, and under autocast, a module computes as it
    did before, in its own dtype; call the network under ``torch.no_grad()``, as pipelines do, for it to be fast.

    Args:
        model_or_pipeline: a UNet2DModel, UNet2DConditionModel, AutoencoderKL or VQModel, or a pipeline with some of these.
        dtype: what the denoising network computes in: torch.float32, bfloat16 or float16. The time embedding, the norms'
            statistics, and what it takes and returns keep their dtype, so the sampler's loop does. None is the dtype of its
            weights. An autoencoder stays in its own.
        engine: ``eager``; ``compiled``, torch.compile of the denoising network without graph breaks; ``captured``, on a GPU,
            the same replayed from CUDA graphs; ``auto`` is eager.

    Returns:
        What was replaced, what not, and why.

    Raises:
        ValueError: there is nothing here to accelerate, or an option is unknown or cannot be served.

    Accelerated already, that is undone first: the last call's options count. What is replaced later (a layer, an activation, an
    attention processor) is computed by its own code; in a network with a ``dtype``, if it is not compiled, it is treated at
    the next call as if it had been there before.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16, torch.float16, or None; got {dtype!r}")
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    _check_kind(model_or_pipeline)
    components = dict(_networks(model_or_pipeline))
    denoisers = [model for model in map(_inside, components.values()) if isinstance(model, _DENOISERS)]
    if not denoisers and engine not in ("auto", "eager"):
        raise ValueError(f"engine {engine!r} is for denoising networks, and there is none here")
    for model in denoisers:
        engine = select_engine(engine, model.device)
    unaccelerate(model_or_pipeline)
    report = Report("eager" if engine == "auto" else engine)
    for name, model in components.items():
        _accelerate_model(name, model, dtype, report)
        keep_memory(model.device)
    if isinstance(model_or_pipeline, DiffusionPipeline):
        _replace_schedulers(model_or_pipeline, report)
    return report


def unaccelerate(model_or_pipeline: nn.Module | DiffusionPipeline) -> Any:
    """Undoes :func:`accelerate`: modules, processors, schedulers and layouts are those from before. What was changed since,
    such as a scheduler or processor set by hand, stays. Nothing happens to what was not accelerated.

    Returns:
        ``model_or_pipeline``.

    Raises:
        ValueError: it is neither a model nor a pipeline of diffusers.
    """
    _check_kind(model_or_pipeline)
    for _, network in _networks(model_or_pipeline):
        model = _inside(network)
        if vars(model).pop("_fast_engine", None) is not None:
            vars(model).pop("_compiled_call_impl", None)
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, _Newcomers):
                del model._forward_pre_hooks[key]
        # What has been taken out since may be put back in.
        for module in dict.fromkeys([*model.modules(), *vars(model).pop("_fast_modules", ())]):
            _undo(module)
            if isinstance(module, Attention) and isinstance(module.processor, FastAttnProcessor):
                module.set_processor(module.processor.original)
            for parameter in module.parameters(recurse=False):
                forget(parameter)
    if isinstance(model_or_pipeline, DiffusionPipeline):
        for name, component in model_or_pipeline.components.items():
            if isinstance(component, tuple(_SCHEDULERS.values())) and component.replaces is not None:
                setattr(model_or_pipeline, name, component.replaces)
    return model_or_pipeline


def _check_kind(given: Any) -> None:
    if isinstance(given, (DiffusionPipeline, *_DENOISERS, *_AUTOENCODERS)):
        return
    if isinstance(given, UNet):
        hint = "; a ddim_fast.UNet is made of these operators already, and ddim_fast.Sampler takes its dtype and engine"
    elif isinstance(given, torch._dynamo.eval_frame.OptimizedModule):
        hint = "; what torch.compile returned comes too late: accelerate the model itself, then compile it"
    else:
        hint = ""
    raise ValueError(
        "accelerate and unaccelerate take a UNet2DModel, UNet2DConditionModel, AutoencoderKL or VQModel of diffusers, or a "
        f"pipeline; got {type(given).__name__}{hint}"
    )


def _networks(given: nn.Module | DiffusionPipeline) -> Iterator[tuple[str, nn.Module]]:
    """The networks served here, with their names: of a model itself that is empty."""
    components = given.components.items() if isinstance(given, DiffusionPipeline) else [("", given)]
    for name, component in components:
        if isinstance(_inside(component), (*_DENOISERS, *_AUTOENCODERS)):
            yield name, component


def _inside(component: Any) -> Any:
    """The model in what torch.compile returned."""
    return component._orig_mod if isinstance(component, torch._dynamo.eval_frame.OptimizedModule) else component


def _accelerate_model(name: str, model: nn.Module, dtype: torch.dtype | None, report: Report) -> None:
    reason = _why_not_model(model)
    if reason is not None:
        report.left_alone.append(LeftAlone(name, type(_inside(model)).__name__, reason))
        return
    denoises = isinstance(model, _DENOISERS)
    _Visit(dtype if denoises else None, report).model(model, name)
    model._fast_modules = list(model.modules())
    if denoises and dtype is not None:
        model.register_forward_pre_hook(_Newcomers(model, dtype), prepend=True)
    if denoises and report.engine != "eager":
        _set_engine(model, report.engine)


def _why_not_model(model: nn.Module) -> str | None:
    if model is not _inside(model) or model._compiled_call_impl is not None:
        return "it is compiled already: accelerate it first, then compile"
    moved = hasattr(model, "_hf_hook") or "forward" in vars(model) or hasattr(model, "_diffusers_hook")
    if moved or any(map(_is_moved, model.modules())):
        return "a hook moves or changes its weights (offloading, layerwise casting): accelerate it without"
    if any(p.is_meta for p in model.parameters()):
        return "some of its weights are not in memory (offloading)"
    return None


def _is_moved(module: nn.Module) -> bool:
    hooks = getattr(module, "_diffusers_hook", None)
    return hooks is not None and any(hooks.get_hook(name) is not None for name in ("layerwise_casting", "group_offloading"))


class _Newcomers:
    """A forward pre-hook of a network that computes in a dtype of its own. What has been put into the network since the last
    call, such as a layer or an attention processor with weights, would not fit in as it is: it is treated as if it had been
    there when the network was accelerated.

    Args:
        model: the network.
        dtype: what it computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self._remember()

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling() and self._there != self._now():
            with _LOOKING:
                if self._there != self._now():  # no other thread has done it meanwhile
                    self._visit()

    def _now(self) -> list[Any]:
        """What may be replaced, quickly: this is made at every call."""
        return [*chain.from_iterable(map(dict.values, self._children)), *(attn.processor for attn in self._attentions)]

    def _visit(self) -> None:
        modules = list(self.model.modules())
        # A layer of ours that LoRA wraps takes any input, and may be unwrapped again.
        wrapped = {getattr(module, "base_layer", None) for module in modules}
        for module in modules:
            if module not in wrapped:
                _undo(module)
        _Visit(self.dtype, Report(""), again=True).model(self.model, "")
        self.model._fast_modules = list(dict.fromkeys([*self.model._fast_modules, *self.model.modules()]))
        self._remember()

    def _remember(self) -> None:
        modules = list(self.model.modules())
        self._children = [module._modules for module in modules]
        self._attentions = [module for module in modules if isinstance(module, Attention)]
        self._there = self._now()


# Held while a network's newcomers are visited; not an attribute of theirs, because networks are copied.
_LOOKING = threading.Lock()


class _Visit:
    """One walk through a model.

    Args:
        dtype: what the model shall compute in, None for its own.
        report: gets what is replaced and what is not.
        again: attention processors stay those that are there: ours, and what has been set by hand since.
    """

    def __init__(self, dtype: torch.dtype | None, report: Report, again: bool = False) -> None:
        self.dtype = dtype
        self.report = report
        self.again = again

    def model(self, model: nn.Module, name: str) -> None:
        """All of a model."""
        self._visit(model, name)
        if isinstance(model, _DENOISERS) and type(model.conv_out) is FastConv2d:
            adopt(model.conv_out, FastConv2d, self.dtype, is_last=True)

    def _visit(self, module: nn.Module, name: str) -> None:
        if isinstance(module, (TimestepEmbedding, nn.Embedding)) or type(module) in FAST:
            return  # small and exact; or met before, under another name
        reason = _why_closed(module)
        if reason is not None:
            self._leave(module, name, reason)
            return
        leaf = {nn.Conv2d: self._conv, nn.Linear: self._linear, nn.LayerNorm: self._layer_norm, nn.GroupNorm: self._group_norm}
        if type(module) in leaf:
            leaf[type(module)](module, name)
            return
        if any(True for _ in module.parameters(recurse=False)):
            self._leave(module, name, "it is none of the classes served here")
            return
        if isinstance(module, Attention) and self.dtype is not None:
            reason = _why_not_projections(module)
            if reason is not None:
                self._leave(module, name, reason)
                return
        for child_name, child in module.named_children():
            if isinstance(module, ResnetBlock2D) and child_name == "time_emb_proj":
                continue  # small and exact, too
            path = f"{name}.{child_name}" if name else child_name
            if isinstance(module, _DENOISERS) and child_name == "conv_out" and type(child) is not nn.Conv2d:
                self._leave(child, path, "it is no convolution, and returns what the network does")
            else:
                self._visit(child, path)
        for kind, block in ((ResnetBlock2D, self._resnet), (Upsample2D, self._upsample), (Attention, self._attention)):
            if isinstance(module, kind):
                block(module, name)
        if isinstance(module, _WITH_OUTPUT_LAYERS):
            self._output_norm(module, name)

    def _conv(self, conv: nn.Conv2d, name: str) -> None:
        if conv.padding_mode != "zeros":
            self._leave(conv, name, f"its padding_mode is {conv.padding_mode}")
            return
        by = "conv3x3" if is_conv3x3(conv) else "PyTorch in channels_last"
        self._adopt(conv, FastConv2d, name, by, self.dtype)

    def _linear(self, linear: nn.Linear, name: str) -> None:
        if self.dtype is not None:  # that of the weights too: they may be moved to another one later
            self._adopt(linear, FastLinear, name, f"PyTorch in {self.dtype}", self.dtype)

    def _layer_norm(self, norm: nn.LayerNorm, name: str) -> None:
        if norm.weight is not None and self.dtype is not None:
            self._adopt(norm, FastLayerNorm, name, f"PyTorch in {self.dtype}")

    def _group_norm(self, norm: nn.GroupNorm, name: str) -> None:
        self._adopt(norm, FastGroupNorm, name, "group_norm_silu")

    def _resnet(self, block: ResnetBlock2D, name: str) -> None:
        reason = why_not_resnet(block) if type(block) is ResnetBlock2D else _OF_ITS_OWN
        if reason is None:
            self._adopt(block, FastResnetBlock2D, name, "group_norm_silu, conv3x3")
        else:
            self._keep(block, name, reason)

    def _upsample(self, block: Upsample2D, name: str) -> None:
        reason = why_not_upsample(block) if type(block) is Upsample2D else _OF_ITS_OWN
        if reason is None:
            self._adopt(block, FastUpsample2D, name, "conv3x3")
        else:
            self._keep(block, name, reason)

    def _attention(self, attn: Attention, name: str) -> None:
        if self.dtype is not None:
            attn.register_forward_pre_hook(CastMask(), with_kwargs=True)
        if self.again:
            return
        reason = why_not_attention(attn, attn.processor) if type(attn) is Attention else _OF_ITS_OWN
        if reason is not None:
            self._keep(attn, name, reason)
            return
        attn.set_processor(FastAttnProcessor(attn.processor, self.dtype))
        self.report.replaced.append(Accelerated(name, "Attention", "attention"))

    def _output_norm(self, module: nn.Module, name: str) -> None:
        """The norm before the last convolution, and its SiLU."""
        norm, act = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if norm is None or type(act) is not nn.SiLU or not is_untouched(norm, FastGroupNorm) or not is_untouched(act):
            return
        adopt(norm, FastGroupNormSiLU)
        norm._fast_owner = (module,)
        self._adopt(act, FusedSiLU, f"{name}.conv_act" if name else "conv_act", "group_norm_silu")

    def _adopt(self, module: nn.Module, kind: type[nn.Module], name: str, by: str, dtype: torch.dtype | None = None) -> None:
        self.report.replaced.append(Accelerated(name, FAST[kind].__name__, by))
        adopt(module, kind, dtype)

    def _keep(self, module: nn.Module, name: str, why: str) -> None:
        """Leaves a module as it is, while its children may have been replaced."""
        self.report.left_alone.append(LeftAlone(name, type(module).__name__, why))

    def _leave(self, module: nn.Module, name: str, why: str) -> None:
        """Leaves a module and all in it as they are. In a network of another dtype it gets its input in its own."""
        self._keep(module, name, why)
        dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
        if self.dtype is None or not dtypes or self.dtype in dtypes:
            return
        while module is not None and type(module) not in FAST:  # a layer that LoRA wraps may be unwrapped again
            module.register_forward_pre_hook(CastInputs(max(dtypes, key=lambda d: d.itemsize)), with_kwargs=True)
            module = getattr(module, "base_layer", None)


_OF_ITS_OWN = "it is a class of its own"


def _why_closed(module: nn.Module) -> str | None:
    """Why nothing in a module may be replaced, or None."""
    if hasattr(module, "base_layer"):
        return "it is LoRA-wrapped"
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return "its forward is somebody else's (a hook)"
    if hasattr(module, "parametrizations"):
        return "its weights are parametrized"
    for parameter in module.parameters(recurse=False):
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return "its weights are quantised"
    return None


def _why_not_projections(attn: Attention) -> str | None:
    """Why the projections of attention may not compute in another dtype, or None: where it is not ours that computes with them,
    they would meet weights that do not."""
    processor = attn.processor.original if isinstance(attn.processor, FastAttnProcessor) else attn.processor
    if _stays(processor):
        return f"its processor, {type(processor).__name__}, has weights of its own"
    if why_not_attention(attn, processor) is None:
        return None
    parts = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "norm_cross")
    return next((f"its {name} is left alone" for name in parts if _stays(getattr(attn, name, None))), None)


def _stays(part: Any) -> bool:
    """Whether a part of attention has weights that are left alone: of a module others than those of the layers served here, of
    another object, which nobody looks into, any."""
    if isinstance(part, nn.Module):
        return any(_why_closed(m) is not None or _is_unknown(m) for m in part.modules())
    leaves = torch.utils._pytree.tree_leaves(vars(part)) if hasattr(part, "__dict__") else []
    return any(isinstance(leaf, (torch.Tensor, nn.Module)) for leaf in leaves)


def _is_unknown(module: nn.Module) -> bool:
    """Whether a module has weights, and is none of the layers served here."""
    return type(module) not in FAST.values() and any(True for _ in chain(module.parameters(False), module.buffers(False)))


def _replace_schedulers(pipe: DiffusionPipeline, report: Report) -> None:
    served = {name for name, _ in _networks(pipe)}
    for name, component in pipe.components.items():
        kind = type(component)
        if kind in _SCHEDULERS:
            fast = _SCHEDULERS[kind].from_config(component.config)
            if component.num_inference_steps is not None:
                fast.set_timesteps(component.num_inference_steps, component.timesteps.device)
            reason = _why_not_scheduler(component, fast)
            if reason is not None:
                report.left_alone.append(LeftAlone(name, kind.__name__, reason))
                continue
            fast.replaces = component
            setattr(pipe, name, fast)
            # What is saved is to be loaded where this package is not.
            pipe.register_to_config(**{name: ("diffusers", kind.__name__)})
            report.replaced.append(Accelerated(name, kind.__name__, _SCHEDULERS[kind].__name__))
        elif name not in served and component is not None and hasattr(component, "config"):
            report.left_alone.append(LeftAlone(name, kind.__name__, "it is none of the classes served here"))


def _why_not_scheduler(scheduler: Any, fast: Any) -> str | None:
    """Why ``fast``, made of the scheduler's config, cannot take its place, or None."""
    for method in ("step", "set_timesteps", "scale_model_input", "add_noise"):
        if method in vars(scheduler):
            return f"its {method} is somebody else's"
    for name in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "init_noise_sigma", "timesteps"):
        theirs, ours = (torch.as_tensor(getattr(s, name, 0.0)).cpu() for s in (scheduler, fast))
        if not torch.equal(theirs, ours):
            return f"its {name} was changed: its config makes it otherwise"
    return None


def _set_engine(model: nn.Module, engine: str) -> None:
    """torch.compile of the model, in place."""
    model._fast_engine = engine
    if engine == "compiled":
        model.compile(fullgraph=True)
        return
    model.compile(fullgraph=True, mode="reduce-overhead")  # CUDA graphs
    model._compiled_call_impl = functools.partial(_replayed, model._compiled_call_impl)


def _replayed(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose result outlives the next replay of its CUDA graph."""
    torch.compiler.cudagraph_mark_step_begin()
    result = compiled(*args, **kwargs)
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, result)


def _undo(module: nn.Module) -> None:
    """Takes back what :class:`_Visit` did to a module, but for its attention processor."""
    give_back(module)
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (CastInputs, CastMask)):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _grouped(title: str, rows: list[tuple[str, str, str]], link: str) -> list[str]:
    """Lines of (class, reason, name), those of one class and reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, reason, name in rows:
        groups.setdefault((kind, reason), []).append(name)
    lines = [f"{title}:"] if groups else []
    for (kind, reason), names in groups.items():
        shown = ", ".join(n for n in names[:3] if n) + (", ..." if len(names) > 3 else "")
        lines.append(f"  {len(names):4d} {kind} {link} {reason}" + (f" ({shown})" if shown else ""))
    return lines
