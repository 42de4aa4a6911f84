"""Which implementations serve the operators here, in words."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..ops.dispatch import explain

if TYPE_CHECKING:
    import torch

__all__ = ["operators_on", "served_by"]


def served_by(device: torch.device, dtype: str) -> str:
    """What serves the operators of a network, as "native (conv3x3, attention), PyTorch (ddim_step)".

    Args:
        dtype: what the network computes in; int8 is of its convolutions alone, and the rest is in another one.
    """
    import torch

    from ..ops.devices import bf16_is_fast

    if dtype == "int8":
        dtype = "bfloat16" if bf16_is_fast(device) else "float32"
    served: dict[str, list[str]] = {}
    for operator, how in operators_on(str(device), getattr(torch, dtype)):
        served.setdefault(how.partition(";")[0].partition(",")[0], []).append(operator)
    return next(iter(served)) if len(served) == 1 else ", ".join(f"{name} ({', '.join(of)})" for name, of in served.items())


def operators_on(device: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """By operator, what serves a typical call, and why others do not."""
    return [(operator, _choice(module, call)) for operator, module, call in _calls(device, dtype)]


def _calls(device: str, dtype: torch.dtype) -> list[tuple[str, ModuleType, Callable[[], object]]]:
    """Operators, the modules that choose their implementations, and calls as a U-Net makes them in inference."""
    import torch

    from ..ops import attention, conv3x3, ddim_step, group_norm_silu

    x = torch.zeros(1, 64, 8, 8, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight, ones = torch.zeros(64, 64, 3, 3, device=device), torch.ones(64, device=device)
    tokens = torch.zeros(64, 1, 64, 128, device=device, dtype=dtype)
    return [
        ("conv3x3", conv3x3, lambda: conv3x3.prepare_conv3x3(weight, dtype)),
        ("group_norm_silu", group_norm_silu, lambda: group_norm_silu.group_norm_silu(x, 32, ones, ones)),
        ("attention", attention, lambda: attention.attention(tokens, tokens, tokens)),
        ("ddim_step", ddim_step, lambda: ddim_step.ddim_step(x, x, [1.0] * 7)),
    ]


def _choice(module: Any, call: Callable[[], object]) -> str:
    """What the choice of an implementation comes to when ``call`` makes it."""
    choose, asked = module.choose, []

    def note(*arguments: Any) -> Any:
        asked.append(arguments)
        return choose(*arguments)

    module.choose = note
    try:
        call()
        return explain(*asked[0])
    except ValueError as error:  # DDIM_FAST_BACKEND names what cannot serve
        return f"none: {error}"
    finally:
        module.choose = choose
