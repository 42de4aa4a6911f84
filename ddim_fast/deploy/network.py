"""The network in ONNX, in two parts: the embeddings of timesteps and labels, and the rest, which takes images."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx import ModelProto
from torch import Tensor, nn

from ..models.unet import UNet
from .quiet import errors_only

__all__ = ["export_network"]


@torch.no_grad()
def export_network(model: UNet, dtype: torch.dtype, opset: int) -> tuple[ModelProto, ModelProto]:
    """The parts of the network.

    Args:
        model: the network to export.
        dtype: the dtype of convolutions and attention; embeddings, statistics, inputs and outputs are float32.
        opset: the version of ONNX's operators.

    Returns:
        The embeddings, from ``timesteps`` (N,) int64, and ``labels`` (N,) int64 if the network has classes, to ``condition``
        (N, K); and the network, from ``x`` (N, C, H, W) and ``condition`` to ``prediction`` like x. N is dynamic.
    """
    inputs = {"x": torch.zeros(2, *model.config.image_shape), "timesteps": torch.tensor([1, 2])}
    if model.config.num_classes is not None:
        inputs["labels"] = torch.tensor([0, 1])  # two tensors: the same one twice would become one input
    batch = torch.export.Dim("N")
    with _quiet():
        program = torch.onnx.export(
            _Parts(model, dtype),
            tuple(inputs.values()),
            input_names=[*inputs],
            output_names=["prediction", "condition"],
            dynamic_shapes={name: {0: batch} for name in inputs},
            opset_version=opset,
            dynamo=True,
            verbose=False,
            custom_translation_table={torch.ops.aten.group_norm.default: _group_norm()},
        )
    assert program is not None  # every export by dynamo returns one
    whole = program.model_proto
    embeddings = _part(whole, [name for name in inputs if name != "x"], "condition")
    return embeddings, _part(whole, ["x", "condition"], "prediction")


class _Parts(nn.Module):
    """The network with its embeddings exposed."""

    def __init__(self, model: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        # In ONNX's layout: in the other one, some operators are exported in PyTorch's fast form.
        self.model = copy.deepcopy(model).for_inference(dtype).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.dtype = dtype

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        condition = self.model.condition(timesteps, labels)
        return self.model.denoise(x.to(self.dtype), condition).float(), condition


def _group_norm() -> Callable[..., Any]:
    """A GroupNorm as InstanceNormalization of its groups, which ONNX Runtime computes in two passes over the numbers. It
    expands the GroupNormalization of later opsets into more passes, and its LayerNormalization subtracts squares of means."""
    from onnxscript import FLOAT
    from onnxscript import opset18 as op

    def group_norm(
        x: FLOAT, num_groups: int, weight: FLOAT, bias: FLOAT, eps: float = 1e-5, cudnn_enabled: bool = True
    ) -> FLOAT:
        groups = op.Reshape(x, op.Constant(value_ints=[0, num_groups, -1]))
        ones, zeros = op.Constant(value_floats=[1.0] * num_groups), op.Constant(value_floats=[0.0] * num_groups)
        normalised = op.Reshape(op.InstanceNormalization(groups, ones, zeros, epsilon=eps), op.Shape(x))
        trailing = op.Constant(value_ints=[1, 2])
        return op.Add(op.Mul(normalised, op.Unsqueeze(weight, trailing)), op.Unsqueeze(bias, trailing))

    return group_norm


def _part(model: ModelProto, inputs: Sequence[str], output: str) -> ModelProto:
    """The part of a model that computes one value from others."""
    needed, nodes = {output}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output) and not set(node.output) <= set(inputs):
            nodes.append(node)
            needed.update(set(node.input) - set(inputs))
    known = {info.name: info for info in (*model.graph.input, *model.graph.output)}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    graph = onnx.helper.make_graph(nodes[::-1], output, [known[i] for i in inputs], [known[output]], weights)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter does not warn of unneeded packages or of its own deprecations."""
    with errors_only("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
