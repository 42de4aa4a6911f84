"""8-bit convolutions for a network on a CPU, with scales calibrated on the network's own inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.conv3x3 import conv3x3_components
from .unet import UNet
from .unet_blocks import Conv3x3

__all__ = ["quantise"]

# A convolution keeps its precision if 8 bits change its result by more than this share (root mean square).
SENSITIVE = 0.05

# The numbers of images, and of values per component, kept from each convolution's input.
IMAGES, VALUES = 2, 4096


@torch.no_grad()
def quantise(model: UNet, sample: Callable[[], object]) -> dict[str, float]:
    """Give the 3x3 convolutions of ``model`` 8-bit products, with static scales.

    The limits of a convolution's transformed pixels, one per component, minimise the squared rounding error of the calibration
    values. A convolution that loses too much precision (:data:`SENSITIVE`) is unchanged.

    Args:
        model: as :meth:`UNet.for_inference` returns it, on a CPU; changed in place.
        sample: calls the model on typical inputs, by sampling a few images.

    Returns:
        The error of 8 bits as a share of the result, for each convolution by name.

    Raises:
        ValueError: the processor has no such products.
    """
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, Conv3x3)}
    inputs = {name: _Inputs() for name in convolutions}
    hooks = [m.register_forward_pre_hook(inputs[name].add, with_kwargs=True) for name, m in convolutions.items()]
    try:
        sample()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _quantise(module, inputs[name]) for name, module in convolutions.items()}


class _Inputs:
    """Calibration inputs of a convolution.

    Attributes:
        values: for each call, samples of each component.
        x, upsample: a few images of the last call.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def add(self, module: Conv3x3, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        """A forward pre-hook."""
        self.x, self.upsample = arguments[0][:IMAGES], options.get("upsample", False)
        components = conv3x3_components(self.x, upsample=self.upsample)
        # Random positions: evenly spaced ones may all lie on the left edges of the images.
        chosen = torch.randint(components.shape[1], (VALUES,), generator=torch.Generator().manual_seed(len(self.values)))
        self.values.append(components[:, chosen].abs())


def _quantise(module: Conv3x3, inputs: _Inputs) -> float:
    before = module.prepared
    exact = module(inputs.x, upsample=inputs.upsample).float()
    module.prepare(module.weight.dtype, _best_limits(torch.cat(inputs.values, dim=1)))
    rounded = module(inputs.x, upsample=inputs.upsample).float()
    error = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= SENSITIVE:
        module.prepared = before
    return error


def _best_limits(values: Tensor) -> Tensor:
    """For (16, M) magnitudes, the limits that round them to 8 bits with the least squared error."""
    largest = values.amax(1).clamp(min=1e-6)
    shares = torch.linspace(0.3, 1.0, 15, dtype=torch.float32)
    errors = []
    for share in shares:
        step = (share * largest / 127)[:, None]
        errors.append(((values / step).round().clamp(max=127) * step - values).square().mean(1))
    return largest * shares[torch.stack(errors).argmin(0)]
