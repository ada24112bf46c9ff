"""The same graph for engines that know opset 23 and not 24 (ONNX Runtime 1.23, the last for Python 3.10).

ONNX Runtime 1.23.0 computes the decode graph wrongly (logits off by several units); 1.23.1 and later do not.

Requires: opset 24. Ensures: opset 23; every TensorScatter is a ScatterElements at explicit rows; QuantizeLinear and
DequantizeLinear without blocks are ONNX Runtime's own of the same name and meaning, for it has kernels for opset 23's
from 1.24 on only (weights in blocks it fuses before it looks for one). All other operators the exporter emits mean the
same in both opsets, so nothing else changes and weights can be shared.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["lower_opset"]

OPSET = 23
QDQ = ("QuantizeLinear", "DequantizeLinear")
MICROSOFT = "com.microsoft"


def lower_opset(model: ir.Model) -> None:
    """Apply the edit in place."""
    for node in list(model.graph):
        if node.op_type == "TensorScatter":
            lower_scatter(model.graph, node)
        elif node.op_type in QDQ and "block_size" not in node.attributes:
            node.domain = MICROSOFT
            model.opset_imports[MICROSOFT] = 1
    model.opset_imports[""] = OPSET
    for function in model.functions.values():
        function.opset_imports[""] = OPSET


def lower_scatter(graph: ir.Graph, node: ir.Node) -> None:
    """TensorScatter(past, new, write_index) along axis -2 -> ScatterElements over rows write_index + 0 .. S - 1."""
    past, new, write_index = node.inputs
    assert past is not None and new is not None and write_index is not None
    nodes: list[ir.Node] = []

    def emit(operator: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator, list(inputs), attributes))
        return nodes[-1].outputs[0]

    def constant(values: list[int]) -> ir.Value:
        nodes.append(ir.node("Constant", [], {"value": ir.tensor(values, ir.DataType.INT64)}))
        return nodes[-1].outputs[0]

    shape = emit("Shape", new)
    length = emit("Squeeze", emit("Shape", new, start=2, end=3), constant([0]))
    zero, one = emit("Squeeze", constant([0]), constant([0])), emit("Squeeze", constant([1]), constant([0]))
    rows = emit("Add", emit("Range", zero, length, one), write_index)  # (S,)
    column = emit("Unsqueeze", rows, constant([0, 1, 3]))  # (1, 1, S, 1)
    indices = emit("Expand", column, shape)
    scattered = emit("ScatterElements", past, indices, new, axis=2)
    graph.insert_before(node, nodes)
    result = node.outputs[0]
    name = result.name
    result.name = None
    scattered.name, scattered.shape, scattered.type = name, result.shape, result.type
    ir.convenience.replace_all_uses_with(result, scattered, replace_graph_outputs=True)
    graph.remove(node, safe=True)
