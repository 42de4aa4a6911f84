"""Which implementations serve a network's operators, in words for people."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import attention, conv3x3, ddim_step, group_norm_silu
from .devices import bf16_is_fast
from .dispatch import explain

__all__ = ["require_backend", "serving", "serving_line"]


def serving(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """By operator, what serves a typical call of a U-Net in inference, and why others do not: "PyTorch; not native: ...".

    Args:
        device: of the tensors.
        dtype: of the tensors.
    """
    return {operator: _choice(module, call) for operator, module, call in _calls(device, dtype)}


def serving_line(device: torch.device, dtype: torch.dtype) -> str:
    """The same in short: "native (conv3x3, ddim_step), PyTorch (group_norm_silu, attention)".

    Args:
        dtype: what a network computes in; torch.int8 as of :class:`ddim_fast.Denoiser`.
    """
    is_int8 = dtype == torch.int8  # only convolutions are, and in C++ alone
    served = serving(device, dtype if not is_int8 else torch.bfloat16 if bf16_is_fast(device) else torch.float32)
    operators: dict[str, list[str]] = {}
    for operator, choice in served.items():
        server = "native" if is_int8 and operator == "conv3x3" else choice.partition(";")[0].partition(",")[0]
        operators.setdefault(server.partition(":")[0], []).append(operator)
    return ", ".join(f"{server} ({', '.join(names)})" for server, names in operators.items())


def require_backend(device: torch.device, dtype: torch.dtype) -> None:
    """See that what DDIM_FAST_BACKEND names can serve a network's typical calls.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if os.environ.get("DDIM_FAST_BACKEND") and dtype != torch.int8:
        for choice in serving(device, dtype).values():
            if choice.startswith("none: "):
                raise ValueError(choice.removeprefix("none: "))


def _calls(device: torch.device, dtype: torch.dtype) -> list[tuple[str, ModuleType, Callable[[], object]]]:
    """Operators, the modules that choose their implementations, and calls as a U-Net makes them in inference."""
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
