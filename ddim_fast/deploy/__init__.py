"""Sampling without torch: export to ONNX, and a sampler for exports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx_sampler import OnnxSampler

__all__ = ["OnnxSampler"]


def __getattr__(name: str) -> Any:
    if name != "OnnxSampler":
        raise AttributeError(f"module 'ddim_fast.deploy' has no attribute {name!r}")
    from .onnx_sampler import OnnxSampler

    return OnnxSampler
