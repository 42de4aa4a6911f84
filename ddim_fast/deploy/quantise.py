"""8-bit convolutions in ONNX for CPUs, with static scales calibrated on the network's own inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto

from ..diffusion.sampler import Sampler
from .quiet import errors_only

__all__ = ["calibration", "quantise"]

# Calibration data: images from seeds outside the usual range, at some of the steps.
IMAGES, STEPS = 8, 20

Inputs = dict[str, np.ndarray]


@torch.no_grad()
def calibration(sampler: Sampler, conditions: np.ndarray) -> list[Inputs]:
    """The network's inputs while it samples a few images, with all classes and without.

    Args:
        sampler: in float32.
        conditions: (S, rows, K), as of :func:`ddim_fast.deploy.sampler_graph.sampler_model`.
    """
    classes = sampler.config.num_classes
    seeds = [2**62 + i for i in range(IMAGES)]
    labels, rows = None, np.zeros(IMAGES, np.int64)
    if classes is not None:
        labels = np.arange(IMAGES) * classes // IMAGES
        rows = labels.copy()
        rows[-1] = classes  # no class; it uses the image of the last one
    every = -(-len(sampler.timesteps) // STEPS)
    inputs = []
    for state in sampler.trajectory(seeds=seeds, labels=labels):
        if state.step % every == 0:
            inputs.append({"x": state.before.cpu().numpy(), "condition": conditions[state.step][rows]})
    return inputs


def quantise(model: ModelProto, inputs: Iterable[Inputs]) -> ModelProto:
    """``model`` with 8-bit convolutions: pixels in 256 levels between the least and the largest value seen, weights in 255
    levels with one scale per output channel. The first and last convolution, attention and the norms are unchanged.

    Args:
        model: the network without its embeddings, in float32.
        inputs: its inputs for the calibration.

    Returns:
        The model in ONNX's QDQ form.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._inputs = iter(inputs)

        def get_next(self) -> Inputs | None:
            return next(self._inputs, None)

    copy = ModelProto()
    copy.CopyFrom(model)  # the quantiser changes its model
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    with errors_only(), tempfile.TemporaryDirectory() as folder:  # its recommendations do not apply here
        quantize_static(
            copy,
            Path(folder) / "quantised.onnx",
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[convolutions[0], convolutions[-1]],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            use_external_data_format=model.ByteSize() > 2**30,
        )
        return onnx.load(Path(folder) / "quantised.onnx")
