"""All uses of PyTorch's private names, for what has no public way.

Checked with torch 2.10 to 2.13: 2.13 runs these functions, and the sources of 2.10 to 2.12 have the names.
tests/ops/test_torch_private.py lists them, and fails for each one that the installed torch lacks. Elsewhere,
ddim_fast/engine/compiled.py takes ``lookup_backend`` from ``torch._dynamo``, and ddim_fast/training calls
``torch._foreach_lerp_``, which PyTorch documents.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "StorageWeakRef",
    "call_compiled",
    "children_of",
    "has_amx",
    "has_avx512_bf16",
    "has_hooks",
    "is_compiled",
    "is_observed",
    "is_profiled",
    "is_transformed",
    "is_view",
    "named_cpp_kernels",
    "remove_pre_hooks",
    "storage_id",
    "tree_leaves",
    "tree_map_only",
    "uncompiled",
    "undo_compile",
    "version",
]


def is_observed() -> bool:
    """Whether PyTorch's operators are being recorded or transformed, so that nothing may be computed without them: under
    torch.export, torch.jit.trace, make_fx, fake tensors, and where :func:`is_transformed` holds."""
    # Not torch.compiler.is_exporting(): before torch 2.13 it holds under torch.compile, too.
    if torch.compiler._is_exporting_flag:
        return True
    if torch.compiler.is_compiling():
        return False
    c = torch._C
    if c._is_tracing() or _is_transforming():
        return True
    if not c._len_torch_dispatch_stack():
        return False
    modes = c._TorchDispatchModeKey
    return any(c._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE))


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, jvp, grad) or forward-mode differentiation is active, in code that is not
    compiled."""
    return not torch.compiler.is_compiling() and _is_transforming()


def _is_transforming() -> bool:
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def has_avx512_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 (AVX-512 BF16)."""
    return torch.cpu._is_avx512_bf16_supported()


def has_amx() -> bool:
    """Whether the CPU has matrix units (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def version(tensor: Tensor) -> int | None:
    """The number of operations that have written into ``tensor``; None for tensors of inference mode, which do not count."""
    return None if tensor.is_inference() else tensor._version


def storage_id(tensor: Tensor) -> int:
    """The ``cdata`` of a :class:`StorageWeakRef` to the tensor's storage. While such a reference is held, no other storage
    has it."""
    return tensor.untyped_storage()._cdata


def is_profiled() -> bool:
    """Whether torch.profiler is watching."""
    return torch.autograd.profiler._is_profiler_enabled


def is_view(operator: Any) -> bool:
    """Whether an operator of torch.ops returns its argument's memory as it is."""
    return operator.is_view


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook runs before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def remove_pre_hooks(module: nn.Module, kinds: type | tuple[type, ...]) -> None:
    """Removes the forward pre-hooks of these classes: their handles do not follow a module that is copied."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, kinds):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary in which a module keeps its children: a view that shows later changes."""
    return module._modules


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def call_compiled(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts ``wrap`` of the compiled call in its place, after ``module.compile()``."""
    call: Any = module._compiled_call_impl
    module._compiled_call_impl = wrap(call)


def undo_compile(module: nn.Module) -> None:
    """Undoes ``module.compile()``."""
    vars(module).pop("_compiled_call_impl", None)


def uncompiled(module: Any) -> Any:
    """The module from which torch.compile made ``module``; anything else as it is."""
    return module._orig_mod if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) else module


def named_cpp_kernels() -> AbstractContextManager[Any]:
    """A context in which torch.compile makes C++ kernels that torch.profiler sees, by names such as
    ``graph_0_cpp_fused_add_3``."""
    import torch._inductor.config as config  # which imports much

    return config.patch({"cpp.enable_kernel_profile": True})
