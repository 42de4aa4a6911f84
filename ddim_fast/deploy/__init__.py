"""Sampling without torch: exports to ONNX and to plans of native operators, and a sampler for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx_sampler import OnnxSampler
    from .plan_sampler import PlanSampler

__all__ = ["OnnxSampler", "PlanSampler"]


def __getattr__(name: str) -> Any:
    if name == "OnnxSampler":
        from .onnx_sampler import OnnxSampler

        return OnnxSampler
    if name == "PlanSampler":
        from .plan_sampler import PlanSampler

        return PlanSampler
    raise AttributeError(f"module 'ddim_fast.deploy' has no attribute {name!r}")
