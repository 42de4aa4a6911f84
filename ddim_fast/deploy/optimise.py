"""Fusions for ONNX Runtime's CUDA provider, by its own optimiser."""

from __future__ import annotations

import logging

from onnx import ModelProto

__all__ = ["fuse_for_cuda"]


def fuse_for_cuda(model: ModelProto, half: bool) -> ModelProto:
    """``model`` with GroupNorm and SiLU in one operator and convolutions in NHWC: operators of ONNX Runtime's own that only its
    CUDA provider has.

    Args:
        model: the network without its embeddings, in float32.
        half: convert what lies between the inputs and the output to float16; the fused norms compute in float32 all the same.
    """
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        copy = ModelProto()
        copy.CopyFrom(model)
        options = FusionOptions("unet")
        fused = optimizer.optimize_model(copy, model_type="unet", opt_level=0, optimization_options=options, use_gpu=True)
        if half:
            fused.convert_float_to_float16(keep_io_types=True)
        return fused.model
    finally:
        logging.root.setLevel(level)
