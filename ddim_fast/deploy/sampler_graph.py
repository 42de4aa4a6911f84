"""The exported models, built from the network in ONNX: the network alone, and the whole sampler around it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, helper

from ..diffusion.guidance import apply_guidance
from ..diffusion.solvers import Solver
from ..models.config import UNetConfig
from ..ops.noise import INITIAL_NOISE, box_muller, seeded_words
from .graph import Graph, Value

__all__ = ["sampler_model", "unet_model"]


def unet_model(config: UNetConfig, condition: ModelProto, denoise: ModelProto) -> ModelProto:
    """The network as one model.

    Inputs: ``x`` (N, C, H, W) float32; ``timesteps`` (N,) int64; for a class-conditional network ``labels`` (N,) int64, where
        ``num_classes`` means no label. Output: ``prediction`` like x.

    Args:
        config: the network.
        condition: timesteps (N,), and labels (N,) if there are classes, to (N, K).
        denoise: x and condition to the prediction.
    """
    graph = Graph()
    x = graph.input("x", np.float32, ("N", *config.image_shape))
    inputs = {"timesteps": graph.input("timesteps", np.int64, ("N",))}
    if config.num_classes is not None:
        inputs["labels"] = graph.input("labels", np.int64, ("N",))
    embedded = graph.inline(condition, inputs, "embedding")
    prediction = graph.inline(denoise, {"x": x, "condition": embedded})
    graph.output("prediction", prediction, ("N", *config.image_shape))
    return _model(graph, denoise)


def sampler_model(
    config: UNetConfig, denoise: ModelProto, conditions: np.ndarray, solver: Solver, *, unroll: bool = False
) -> ModelProto:
    """All steps of a sampling run as one model: noise in, images out.

    Inputs:
        ``seeds`` (N,) int64, each in [0, 2^63), as for :meth:`ddim_fast.Sampler.sample`.
        ``x_T`` (M, C, H, W) float32, M = 0 or M = N: noise or latents to start from. The model draws the noise of ``seeds``
        from the Mth on.
        ``labels`` (N,) int64 and ``guidance`` () float32, for a class-conditional network: ``num_classes`` means no label,
        and 1 no guidance, which halves the work.
    Output: ``images`` (N, C, H, W) float32, in [-1, 1] as the network was trained, not clipped.

    Args:
        config: the network.
        denoise: the network without its embeddings: x (N, C, H, W) and condition (N, K) to the prediction.
        conditions: (S, classes and no class, K) float32, the embeddings of each timestep and label; (S, 1, K) for an
            unconditional network.
        solver: the steps.
        unroll: repeat the network once per step, in place of an ONNX Loop: some programs and optimisers know no control flow.
    """
    graph = Graph()
    run = _Run(graph, config, denoise, solver)
    state = [run.x_T] * (1 + solver.memory)
    if unroll:
        for i in range(len(solver.table)):
            tables = (np.arange(len(conditions)), conditions, solver.table)
            index, condition, row = (graph.constant(table[i]) for table in tables)
            state = run.step(graph, state, index, condition, row, f"step{i}/network", None if i == 0 else "step0/network")
    else:
        state = _loop(graph, run, conditions, state)
    graph.output("images", state[0], ("N", *config.image_shape))
    return _model(graph, denoise)


class _Run:
    """The values that all steps use, in the graph around them."""

    def __init__(self, graph: Graph, config: UNetConfig, denoise: ModelProto, solver: Solver) -> None:
        self.config, self.denoise, self.solver = config, denoise, solver
        shape = config.image_shape
        self.seeds = graph.input("seeds", np.int64, ("N",))
        given = graph.input("x_T", np.float32, ("M", *shape))
        drawn = _noise(graph, self.seeds.rows(given.length()), graph.constant(INITIAL_NOISE, np.int64), shape)
        self.x_T = given.concat(drawn)
        self.count = self.seeds.length()
        if config.num_classes is not None:
            labels = graph.input("labels", np.int64, ("N",))
            self.guidance = graph.input("guidance", np.float32, ())
            unguided = graph.op("Equal", self.guidance, graph.constant(1, np.float32), dtype=bool)
            # Unlabelled images come first; without guidance there are none.
            self.unlabelled = self.count * graph.op("Not", unguided).cast(np.int64)
            none = graph.op("Expand", graph.constant([config.num_classes], np.int64), self.unlabelled)
            self.labels = none.concat(labels)

    def step(
        self,
        graph: Graph,
        state: Sequence[Value],
        index: Value,
        conditions: Value,
        row: Value,
        name: str,
        share: str | None = None,
    ) -> list[Value]:
        """The state after a step.

        Args:
            graph: the outer graph, or one inside it.
            state: before the step.
            index: () int64, the step's number.
            conditions: (labels, K), the embeddings at the step's timestep.
            row: the solver's coefficients.
            name, share: see :meth:`Graph.inline`.
        """
        x = state[0]
        if self.config.num_classes is None:
            rows = self.count.inside(graph).concat(graph.constant([1], np.int64))
            output = graph.inline(self.denoise, {"x": x, "condition": graph.op("Expand", conditions, rows)}, name, share)
        else:
            unlabelled = self.unlabelled.inside(graph)
            doubled = x.rows(0, unlabelled).concat(x)
            condition = conditions.gather(self.labels.inside(graph))
            outputs = graph.inline(self.denoise, {"x": doubled, "condition": condition}, name, share)
            # Without guidance both are the same, and their difference is exactly zero.
            unconditional, conditional = outputs.rows(0, self.count.inside(graph)), outputs.rows(unlabelled)
            output = apply_guidance(unconditional, conditional, self.guidance.inside(graph))
        columns = self.solver.table.shape[1]
        coefficients = graph.ops("Split", row, dtypes=[np.float32] * columns, num_outputs=columns)
        noise = _noise(graph, self.seeds.inside(graph), index, self.config.image_shape) if self.solver.stochastic else None
        return list(self.solver.combine(tuple(state), output, coefficients, noise))


def _loop(graph: Graph, run: _Run, conditions: np.ndarray, state: Sequence[Value]) -> list[Value]:
    """All steps as an ONNX Loop. The weights are in its body, where optimisers that prepare them find them."""
    body, shape = Graph("step/"), ("N", *run.config.image_shape)
    index = body.input("step/index", np.int64, ())
    going_on = body.input("step/going_on", bool, ())
    inner = [body.input(f"step/state{k}", np.float32, shape) for k in range(len(state))]
    condition, row = (body.constant(table).gather(index) for table in (conditions, run.solver.table))
    after = run.step(body, inner, index, condition, row, "network")
    body.output("step/still_going_on", going_on, ())
    for k, value in enumerate(after):
        body.output(f"step/next_state{k}", value, shape)
    steps, always = graph.constant(len(run.solver.table), np.int64), graph.constant(True)
    return graph.ops("Loop", steps, always, *state, dtypes=[np.float32] * len(state), body=body.proto("step"))


def _noise(graph: Graph, seeds: Value, step: Value, shape: Sequence[int]) -> Value:
    """The noise of :func:`ddim_fast.seeded_noise` for ``seeds``, (N,) int64: (N, C, H, W) float32."""
    elements = math.prod(shape)
    blocks = -(-elements // 4)
    words = seeded_words(seeds.reshape(-1, 1), graph.constant(np.arange(blocks)[None, :]), step)
    uniform = [(word.cast(np.float64) + 0.5) * 2.0**-32 for word in words]
    columns = [normal.reshape(-1, blocks, 1) for normal in box_muller(_Functions(graph), uniform)]
    normal = columns[0].concat(*columns[1:], axis=2).reshape(-1, 4 * blocks)
    if elements < 4 * blocks:
        bounds = (graph.constant([number], np.int64) for number in (0, elements, 1))
        normal = graph.op("Slice", normal, *bounds)
    return normal.cast(np.float32).reshape(-1, *shape)


class _Functions:
    """The functions that the noise needs, of float64."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def sqrt(self, value: Value) -> Value:
        return self.graph.op("Sqrt", value)

    def log(self, value: Value) -> Value:
        return self.graph.op("Log", value)

    def sin(self, value: Value) -> Value:
        return self.graph.op("Sin", value)

    def cos(self, value: Value) -> Value:
        return self.graph.op("Cos", value)


def _model(graph: Graph, network: ModelProto) -> ModelProto:
    """An ONNX model with the versions of ``network``."""
    name = "ddim_fast"
    return helper.make_model(
        graph.proto(name), producer_name=name, opset_imports=network.opset_import, ir_version=network.ir_version
    )
