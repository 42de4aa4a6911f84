"""Fusions for ONNX Runtime's CUDA provider, by its own optimiser."""

from __future__ import annotations

import contextlib
import io

from onnx import ModelProto, helper

from .quiet import errors_only

__all__ = ["fuse_for_cuda"]


def fuse_for_cuda(model: ModelProto, half: bool) -> ModelProto:
    """``model`` with GroupNorm and SiLU in one operator and convolutions in NHWC, operators that only ONNX Runtime's CUDA
    provider has. Its optimiser's other fusions are left out: they are for Stable Diffusion's blocks.

    Args:
        model: the network without its embeddings, in float32.
        half: convert everything between the inputs and the output to float16; the fused norms still compute in float32.
    """
    # Hide its progress bar, and its warnings about its own operators.
    with errors_only(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return _fused(model, half)


def _fused(model: ModelProto, half: bool) -> ModelProto:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    copy = ModelProto()
    copy.CopyFrom(model)
    options = FusionOptions("unet")
    options.enable_skip_group_norm = options.enable_attention = options.enable_bias_add = False
    fused = optimizer.optimize_model(copy, model_type="unet", opt_level=0, optimization_options=options, use_gpu=True)
    if half:
        fused.convert_float_to_float16(keep_io_types=True)
        fused.topological_sort()
    if "com.microsoft" not in {entry.domain for entry in fused.model.opset_import}:
        fused.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return fused.model
