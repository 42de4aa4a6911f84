"""How a sampling run is executed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ENGINES", "Denoiser", "make_denoiser", "select_engine"]

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]

ENGINES = ("auto", "eager", "compiled")


def select_engine(name: str) -> str:
    """The engine that ``name`` means; ``auto`` is eager, which needs no warm-up.

    Raises:
        ValueError: there is no such engine.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are {', '.join(ENGINES)}")
    return "eager" if name == "auto" else name


def make_denoiser(model: nn.Module, engine: str, dtype: torch.dtype) -> Denoiser:
    """``model`` as a function (x, timesteps, labels) -> float32 prediction, executed by ``engine``.

    Args:
        model: takes (N, C, H, W) images, (N,) or 0-dim timesteps and (N,) labels or None.
        engine: ``eager`` or ``compiled``: torch.compile without graph breaks, one compilation a batch size.
        dtype: what the network computes in; the model itself stays as it is. One that can convert itself, by a method
            ``for_inference(dtype)``, is converted now, once; others compute under autocast.
    """
    converts = dtype != torch.float32 and hasattr(model, "for_inference")
    network = model.for_inference(dtype) if converts else model
    autocast = dtype != torch.float32 and not converts

    def denoise(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        # The layout of the input decides that of the whole network, and convolutions are faster in this one. A copy, because
        # images of one channel count as channels_last already, but do not tell the first convolution so.
        x = torch.empty_like(x, dtype=dtype if converts else None, memory_format=torch.channels_last).copy_(x)
        with torch.autocast(x.device.type, dtype, enabled=autocast):
            # Back in the layout of the sample: only tensors of one layout go through the DDIM step in a single pass.
            return network(x, timesteps, labels).float().contiguous()

    def denoise_at_least_two(x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        # On a CPU, torch sends small convolutions of a single image to another library, which sums in another order and is
        # slower by more than the second image costs: a batch of one is evaluated as two, so that every batch has the same bits.
        if x.device.type == "cpu" and len(x) == 1:
            return denoise(x.expand(2, -1, -1, -1), timesteps, None if labels is None else labels.expand(2))[:1]
        return denoise(x, timesteps, labels)

    return torch.compile(denoise, fullgraph=True, dynamic=False) if engine == "compiled" else denoise_at_least_two
