"""Building ONNX graphs by computing: arithmetic on a :class:`Value` adds nodes to a graph.

So the solvers' steps and the noise by seed, written once for tensors and arrays, build the graph too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Graph", "Value"]


class Graph:
    """A graph that grows. A graph made for the body of a loop may use the values of the one around it.

    Args:
        prefix: the prefix of all names in it; an inner graph must not repeat a name of an outer one.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._count = 0
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> Value:
        """Add an input to the graph; named dimensions are dynamic."""
        self.inputs.append(_info(name, dtype, shape))
        return Value(self, name, np.dtype(dtype))

    def output(self, name: str, value: Value, shape: Sequence[int | str]) -> None:
        """Make ``value`` the output ``name`` of the graph."""
        self.nodes.append(helper.make_node("Identity", [value.name], [name], name=self._name("output")))
        self.outputs.append(_info(name, value.dtype, shape))

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """A constant. Equal small ones are stored once."""
        array = np.asarray(array, dtype)
        key = (str(array.dtype), array.tobytes(), array.shape) if array.size < 16 else None
        if key is not None and key in self._constants:
            return Value(self, self._constants[key], array.dtype)
        name = self._name("constant")
        self.initializers.append(numpy_helper.from_array(array, name))
        if key is not None:
            self._constants[key] = name
        return Value(self, name, array.dtype)

    def op(self, kind: str, first: Value, *others: Value | None, dtype: Any = None, **attributes: Any) -> Value:
        """The result of an operator of ONNX, of the first input's dtype unless ``dtype`` says otherwise."""
        return self.ops(kind, first, *others, dtypes=[first.dtype if dtype is None else dtype], **attributes)[0]

    def ops(self, kind: str, *inputs: Value | None, dtypes: Sequence[Any], **attributes: Any) -> list[Value]:
        """The results of an operator with several outputs, one for each of ``dtypes``."""
        names = [self._name(kind) for _ in dtypes]
        taken = ["" if value is None else value.name for value in inputs]
        self.nodes.append(helper.make_node(kind, taken, names, name=names[0], **attributes))
        return [Value(self, name, np.dtype(dtype)) for name, dtype in zip(names, dtypes, strict=True)]

    def inline(self, model: ModelProto, inputs: Mapping[str, Value], name: str = "network", share: str | None = None) -> Value:
        """The one output, float32, of another model, its nodes put into this graph.

        Args:
            model: the other model.
            inputs: the values in place of its inputs.
            name: the prefix of the names of its nodes and results.
            share: the ``name`` of an earlier call with the same model, whose weights are used.
        """
        outer = {i: value.name for i, value in inputs.items()}
        for tensor in model.graph.initializer:
            outer[tensor.name] = f"{self._prefix}{share or name}/{tensor.name}"
            if share is None:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                copy.name = outer[tensor.name]
                self.initializers.append(copy)

        def renamed(inner: str) -> str:
            return inner and outer.get(inner, f"{self._prefix}{name}/{inner}")

        for node in model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.name = f"{self._prefix}{name}/{node.name or node.output[0]}"  # an optimiser may leave nodes without a name
            copy.input[:] = [renamed(i) for i in node.input]
            copy.output[:] = [renamed(o) for o in node.output]
            self.nodes.append(copy)
        return Value(self, renamed(model.graph.output[0].name), np.dtype(np.float32))

    def proto(self, name: str) -> GraphProto:
        """The graph in ONNX's form, without unused constants."""
        used = set(_taken(self.nodes))
        constants = [tensor for tensor in self.initializers if tensor.name in used]
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs, constants)

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{self._prefix}{kind}_{self._count}"


class Value:
    """A tensor of a graph.

    Attributes:
        graph: the graph to which arithmetic on it adds nodes.
        name: its name in that graph.
        dtype: the dtype of its elements.
    """

    # An array to the left of an operator leaves the operation to this class.
    __array_ufunc__ = None

    def __init__(self, graph: Graph, name: str, dtype: np.dtype) -> None:
        self.graph, self.name, self.dtype = graph, name, dtype

    def inside(self, graph: Graph) -> Value:
        """The same tensor, for use in an inner graph."""
        return Value(graph, self.name, self.dtype)

    def cast(self, dtype: Any) -> Value:
        """Converted to another dtype; integers keep their bits."""
        return self.graph.op("Cast", self, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, *shape: int) -> Value:
        """In another shape; -1 is the remaining size, 0 keeps a dimension."""
        return self.graph.op("Reshape", self, self.graph.constant(shape, np.int64))

    def rows(self, start: Value | int, stop: Value | int | None = None) -> Value:
        """Part of the first dimension."""
        stop = np.iinfo(np.int64).max if stop is None else stop
        bounds = [self._other(b, np.int64).reshape(1) for b in (start, stop)]
        return self.graph.op("Slice", self, *bounds, self.graph.constant([0], np.int64))

    def length(self) -> Value:
        """(1,) int64: its first dimension."""
        return self.graph.op("Shape", self, dtype=np.int64, start=0, end=1)

    def gather(self, index: Value) -> Value:
        """Rows by their numbers."""
        return self.graph.op("Gather", self, index, axis=0)

    def concat(self, *others: Value, axis: int = 0) -> Value:
        """Joined with others."""
        return self.graph.op("Concat", self, *others, axis=axis)

    def clip(self, low: float, high: float) -> Value:
        """Limited to [low, high]."""
        return self.graph.op("Clip", self, self._other(low), self._other(high))

    def __add__(self, other: Any) -> Value:
        return self.graph.op("Add", self, self._other(other))

    def __sub__(self, other: Any) -> Value:
        return self.graph.op("Sub", self, self._other(other))

    def __mul__(self, other: Any) -> Value:
        return self.graph.op("Mul", self, self._other(other))

    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Any) -> Value:
        return self.graph.op("BitwiseAnd", self, self._other(other))

    def __xor__(self, other: Any) -> Value:
        return self.graph.op("BitwiseXor", self, self._other(other))

    __rand__, __rxor__ = __and__, __xor__

    def __rshift__(self, other: int) -> Value:
        """A logical shift of int64: zeros come in from the left. ONNX shifts unsigned numbers only."""
        shifted = self.graph.op("BitShift", self.cast(np.uint64), self.graph.constant(other, np.uint64), direction="RIGHT")
        return shifted.cast(np.int64)

    def _other(self, other: Any, dtype: Any = None) -> Value:
        return other if isinstance(other, Value) else self.graph.constant(other, self.dtype if dtype is None else dtype)


def _taken(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """The names of all inputs of nodes, including nodes in the bodies of loops."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _taken(attribute.g.node)


def _info(name: str, dtype: Any, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
