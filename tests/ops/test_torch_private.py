"""The private names of PyTorch that the package uses: a release that lacks one is found here, by its name."""

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import nn

from ddim_fast.ops import torch_private

MODULE = nn.Conv2d(1, 1, 3)
ROOTS = {"torch": torch, "tensor": torch.ones(1), "module": MODULE, "compiled": torch.compile(MODULE)}

NAMES = [
    "torch.compiler._is_exporting_flag",
    "torch._C._is_tracing",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_dispatch_mode",
    "torch._C._TorchDispatchModeKey.PROXY",
    "torch._C._TorchDispatchModeKey.FAKE",
    "torch._C._functorch.maybe_current_level",
    "torch.autograd.forward_ad._current_level",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_amx_tile_supported",
    "torch.multiprocessing.reductions.StorageWeakRef",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map_only",
    "torch._dynamo.eval_frame.OptimizedModule",
    "torch._dynamo.lookup_backend",
    "torch._foreach_lerp_",
    "torch.autograd.profiler._is_profiler_enabled",
    "torch.ops.aten.view.default.is_view",
    "torch.ops.aten.view.default._schema.is_mutable",
    "torch._inductor.config.patch",
    "torch._inductor.config.cpp.enable_kernel_profile",
    "tensor._version",
    "module._forward_hooks",
    "module._forward_pre_hooks",
    "module._forward_pre_hooks_with_kwargs",
    "module._modules",
    "module._compiled_call_impl",
    "module._conv_forward",
    "compiled._orig_mod",
]


@pytest.mark.parametrize("name", NAMES)
def test_this_torch_has(name):
    root, *parts = name.split(".")
    value = ROOTS[root]
    for part in parts:
        assert hasattr(value, part), f"torch {torch.__version__} has no {name}: see ddim_fast/ops/torch_private.py"
        value = getattr(value, part)


def test_storages_are_told_apart():
    a, b = torch.ones(2), torch.ones(2)
    reference = torch_private.StorageWeakRef(a.untyped_storage())
    assert torch_private.storage_id(a) == torch_private.storage_id(a[1:]) == reference.cdata != torch_private.storage_id(b)


def test_a_compiled_module_is_found_and_undone():
    module = nn.Linear(2, 2)
    assert torch_private.uncompiled(torch.compile(module)) is module and torch_private.uncompiled(3) == 3
    module.compile(backend="eager")
    assert torch_private.is_compiled(module)
    torch_private.call_compiled(module, lambda call: lambda x: -call(x))
    assert torch.equal(module(torch.ones(1, 2)), -module.forward(torch.ones(1, 2)))
    torch_private.undo_compile(module)
    assert not torch_private.is_compiled(module)


def test_hooks_of_a_class_are_removed():
    class Hook:
        def __call__(self, module, args, kwargs):
            return None

    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(Hook(), with_kwargs=True)
    assert torch_private.has_hooks(module)
    torch_private.remove_pre_hooks(module, Hook)
    assert not torch_private.has_hooks(module) and not module._forward_pre_hooks_with_kwargs
