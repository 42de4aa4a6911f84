"""Acceleration of diffusers' networks and pipelines, in place and reversible.

>>> report = ddim_fast.accelerate(pipe, dtype=torch.bfloat16)
>>> print(report)
>>> images = pipe(batch_size=8, num_inference_steps=20).images
>>> ddim_fast.unaccelerate(pipe)
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..engine import ENGINES, select_engine
from ..models.unet import UNet
from ..ops import torch_private
from ..ops.devices import keep_memory
from ..ops.weight_cache import forget
from .diffusers import FastDDIMInverseScheduler, FastDDIMScheduler
from .diffusers_modules import FastAttnProcessor
from .replacement import DENOISERS, AdoptReplacements, adopt_model, restore_module
from .report import Accelerated, LeftAlone, Report

from diffusers import (  # isort: skip - the modules above report a missing diffusers
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    VQModel,
)
from diffusers.models.attention_processor import Attention

__all__ = ["Accelerated", "LeftAlone", "Report", "accelerate", "refresh", "unaccelerate"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Accelerated in their own dtype: an autoencoder runs once for each image, and rounding in it would be visible.
_AUTOENCODERS = (AutoencoderKL, VQModel)
_SCHEDULERS = {DDIMScheduler: FastDDIMScheduler, DDIMInverseScheduler: FastDDIMInverseScheduler}


def accelerate(
    model_or_pipeline: nn.Module | DiffusionPipeline, *, dtype: torch.dtype | None = None, engine: str = "eager"
) -> Report:
    """Make a network of diffusers compute with the operators of this package, in place, until :func:`unaccelerate`.

    It replaces residual blocks, norms with the SiLU after them, attention, convolutions with their layout (channels_last) and,
    in a pipeline, a DDIMScheduler or DDIMInverseScheduler. No weight is changed, moved or renamed: parameters, ``state_dict``,
    ``save_pretrained``, ``.to(...)``, LoRA and seeds work as before. No class of diffusers is touched.

    Tensors derived from the weights for inference are kept beside them, up to four times their memory, and made anew when the
    weights change. Writes through ``.data`` are not noticed (:func:`ddim_fast.ops.weight_cache.cached` says which others): call
    :func:`refresh` after ``fuse_lora``, ``unfuse_lora`` or an EMA's ``copy_to``.

    Modules of other classes, LoRA-wrapped, quantised or parametrized ones, and models whose weights an offloading hook moves,
    are left alone and reported. While a gradient is recorded, and under autocast, a module computes as before, in its own
    dtype. Call the network under ``torch.no_grad()``, as pipelines do, to make it fast.

    Args:
        model_or_pipeline: a UNet2DModel, UNet2DConditionModel, AutoencoderKL or VQModel, or a pipeline with some of these.
        dtype: the denoising network's dtype of computation: torch.float32, bfloat16 or float16. The time embedding, the norms'
            statistics, the inputs and the output keep their dtype, and so does the sampler's loop. None is the dtype of its
            weights. An autoencoder keeps its own.
        engine: ``eager``; ``compiled``, torch.compile of the denoising network without graph breaks; ``captured``, on a GPU,
            the same replayed from CUDA graphs; ``auto`` is eager.

    Returns:
        The replaced modules, and those left alone with the reason.

    Raises:
        ValueError: there is nothing to accelerate, or an option is unknown or unsupported.

    A second call undoes the first one; its options count. A layer, activation or attention processor that is replaced later
    runs its own code; in an uncompiled network with a ``dtype``, the next call adapts it as if it had been there from the
    start.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16, torch.float16, or None; got {dtype!r}")
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    networks = _networks(model_or_pipeline)
    denoisers = [model for model in map(torch_private.uncompiled, networks.values()) if isinstance(model, DENOISERS)]
    if not denoisers and engine not in ("auto", "eager"):
        raise ValueError(f"engine {engine!r} needs a denoising network, and there is none here")
    for model in denoisers:
        if engine == "captured" and model.device.type != "cuda":
            raise ValueError(
                f"the captured engine is a CUDA graph here, but the network is on {model.device}; choose eager or compiled"
            )
        engine = select_engine(engine, model.device)
    unaccelerate(model_or_pipeline)
    report = Report("eager" if engine == "auto" else engine)
    for name, model in networks.items():
        _accelerate_model(name, model, dtype, report)
        keep_memory(model.device)
    if isinstance(model_or_pipeline, DiffusionPipeline):
        _replace_schedulers(model_or_pipeline, networks, report)
    return report


def refresh(model_or_pipeline: nn.Module | DiffusionPipeline) -> None:
    """Drop the tensors derived from the weights of an accelerated network; the next call makes them anew. Needed after writes
    through ``.data``, which PyTorch does not count, such as those of ``fuse_lora`` and an EMA's ``copy_to``.

    Raises:
        ValueError: it is neither a model nor a pipeline of diffusers.
    """
    for network in _networks(model_or_pipeline).values():
        for parameter in network.parameters():
            forget(parameter)


def unaccelerate(model_or_pipeline: nn.Module | DiffusionPipeline) -> Any:
    """Undo :func:`accelerate`: restore modules, processors, schedulers and layouts. Later changes, such as a scheduler or
    processor set by hand, stay. A network that was not accelerated is unchanged.

    Returns:
        ``model_or_pipeline``.

    Raises:
        ValueError: it is neither a model nor a pipeline of diffusers.
    """
    for network in _networks(model_or_pipeline).values():
        model = torch_private.uncompiled(network)
        if vars(model).pop("_fast_engine", None) is not None:
            torch_private.undo_compile(model)
        torch_private.remove_pre_hooks(model, AdoptReplacements)
        # Modules that have been taken out may be put back in.
        for module in dict.fromkeys([*model.modules(), *vars(model).pop("_fast_modules", ())]):
            restore_module(module)
            if isinstance(module, Attention) and isinstance(module.processor, FastAttnProcessor):
                module.set_processor(module.processor.original)
            for parameter in module.parameters(recurse=False):
                forget(parameter)
    if isinstance(model_or_pipeline, DiffusionPipeline):
        for name, component in model_or_pipeline.components.items():
            if isinstance(component, (FastDDIMScheduler, FastDDIMInverseScheduler)) and component.replaces is not None:
                setattr(model_or_pipeline, name, component.replaces)
    return model_or_pipeline


def _networks(given: nn.Module | DiffusionPipeline) -> dict[str, Any]:
    """The supported networks, by their names in a pipeline; a model's own name is empty."""
    served = (*DENOISERS, *_AUTOENCODERS)
    if isinstance(given, DiffusionPipeline):
        components = given.components.items()
        return {name: network for name, network in components if isinstance(torch_private.uncompiled(network), served)}
    if isinstance(given, served):
        return {"": given}
    hint = ""
    if isinstance(given, UNet):
        hint = "; a ddim_fast.UNet is made of these operators already, and ddim_fast.Sampler takes its dtype and engine"
    elif torch_private.uncompiled(given) is not given:
        hint = "; it is compiled already: accelerate the model itself, then compile it"
    raise ValueError(
        "accelerate, refresh and unaccelerate take a UNet2DModel, UNet2DConditionModel, AutoencoderKL or VQModel of diffusers, "
        f"or a pipeline; got {type(given).__name__}{hint}"
    )


def _accelerate_model(name: str, model: nn.Module, dtype: torch.dtype | None, report: Report) -> None:
    reason = _why_not_model(model)
    if reason is not None:
        report.left_alone.append(LeftAlone(name, type(torch_private.uncompiled(model)).__name__, reason))
        return
    denoises = isinstance(model, DENOISERS)
    adopt_model(model, name, dtype if denoises else None, report)
    vars(model)["_fast_modules"] = list(model.modules())
    if denoises and dtype is not None:
        model.register_forward_pre_hook(AdoptReplacements(model, dtype), prepend=True)
    if denoises and report.engine != "eager":
        _set_engine(model, report.engine)


def _why_not_model(model: nn.Module) -> str | None:
    if torch_private.uncompiled(model) is not model or torch_private.is_compiled(model):
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


def _replace_schedulers(pipe: DiffusionPipeline, networks: dict[str, nn.Module], report: Report) -> None:
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
            # A saved pipeline must load without this package.
            pipe.register_to_config(**{name: ("diffusers", kind.__name__)})
            report.replaced.append(Accelerated(name, kind.__name__, _SCHEDULERS[kind].__name__))
        elif name not in networks and component is not None and hasattr(component, "config"):
            report.left_alone.append(LeftAlone(name, kind.__name__, "it is none of the supported classes"))


def _why_not_scheduler(scheduler: Any, fast: Any) -> str | None:
    """The reason why ``fast``, made from the scheduler's config, cannot replace it, or None."""
    for method in ("step", "set_timesteps", "scale_model_input", "add_noise"):
        if method in vars(scheduler):
            return f"its {method} is not diffusers' own"
    for name in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "init_noise_sigma", "timesteps"):
        theirs, ours = (torch.as_tensor(getattr(s, name, 0.0)).cpu() for s in (scheduler, fast))
        if not torch.equal(theirs, ours):
            return f"its {name} was changed and does not match its config"
    return None


def _set_engine(model: nn.Module, engine: str) -> None:
    """torch.compile of the model, in place."""
    vars(model)["_fast_engine"] = engine
    if engine == "compiled":
        model.compile(fullgraph=True)
        return
    model.compile(fullgraph=True, mode="reduce-overhead")  # CUDA graphs
    torch_private.call_compiled(model, lambda compiled: functools.partial(_replayed, compiled))


def _replayed(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """A call whose result outlives the next replay of its CUDA graph."""
    torch.compiler.cudagraph_mark_step_begin()
    result = compiled(*args, **kwargs)
    return torch_private.tree_map_only(torch.Tensor, torch.Tensor.clone, result)
