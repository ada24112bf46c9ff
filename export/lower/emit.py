"""Nodes that take the place of one: named after it, typed, with their constants inside the graph.

Requires: the node stands in a main graph. Ensures: nothing that others read changes its name; equal constants are
stored once. Knows no operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir

from calibration.trt_rules import problem
from runtime.errors import BundleError

__all__ = ["Emitter", "called", "refusal"]

Number = bool | int | float


class Emitter:
    """Collects nodes and puts them where ``node`` stands."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph = graph
        self.node = node
        self.nodes: list[ir.Node] = []
        self.used: Counter[str] = Counter()

    def __call__(
        self, operator: str, *inputs: ir.Value, dtype: ir.DataType, **attributes: int | float | Sequence[int]
    ) -> ir.Value:
        """One more node; its only output."""
        (output,) = self.many(operator, *inputs, dtype=dtype, outputs=1, **attributes)
        return output

    def many(
        self,
        operator: str,
        *inputs: ir.Value,
        dtype: ir.DataType,
        outputs: int,
        **attributes: int | float | Sequence[int],
    ) -> Sequence[ir.Value]:
        """One more node with several outputs of one dtype."""
        number = self.used[operator]
        self.used[operator] += 1
        name = f"{called(self.node)}/{operator}" + (f"_{number}" if number else "")
        node = ir.node(operator, list(inputs), attributes, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}:{index}" if index else name
            output.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return node.outputs

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` in ``dtype``."""
        return value if value.dtype == dtype else self("Cast", value, dtype=dtype, to=int(dtype))

    def constant(self, values: Number | Sequence[Number], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """An initializer, found again by what it holds."""
        listed = "_".join(map(str, values)) if isinstance(values, Sequence) else str(values)
        shape = "list" if isinstance(values, Sequence) else "scalar"
        name = f"lowered.{dtype.name.lower()}.{shape}.{listed}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(values, dtype=dtype, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def place(self) -> None:
        """Put the nodes before ``node``, which stays."""
        self.graph.insert_before(self.node, self.nodes)
        self.nodes = []

    def replace(self, result: ir.Value) -> None:
        """Put the nodes there; ``result`` takes the name, the type and the readers of the node's first output."""
        self.place()
        old = self.node.outputs[0]
        name, old.name = old.name, None
        result.name, result.shape, result.type = name, old.shape, old.type or result.type
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)


def called(node: ir.Node) -> str:
    """What a node's replacements are named after."""
    return node.name or f"{node.op_type}:{node.outputs[0].name}"


def refusal(node: ir.Node, found: str, expected: str) -> BundleError:
    """Why a node cannot be lowered."""
    return BundleError(f"{problem(node, found, expected)}; export the bundle again with this release's exporter")
