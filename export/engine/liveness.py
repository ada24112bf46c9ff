"""The most memory that a graph's intermediate tensors take at a time, when each lives from its node to its last use.

An upper bound of what an engine asks for: TensorRT reuses memory in the same way (its activation memory is planned by
liveness), and fusion takes tensors away, chains of pointwise operators and, where it has a kernel for them, attention
scores. Aligned sizes, reformatting and the scratch memory of a tactic come on top (``estimate.WORKSPACE``).

Inputs, outputs and weights are not counted.
"""

from __future__ import annotations

import onnx

from export.engine.sizes import Graph
from export.engine.weights import constant_names

__all__ = ["activation_bytes"]

VIEWS = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")  # the same memory under another shape


def activation_bytes(graph: Graph) -> int:
    """Peak over the nodes, in bytes."""
    constants = constant_names(graph)
    nodes = [node for node in graph.nodes if node.output[0] not in constants]
    home = {name: name for name in (*graph.inputs, *constants)}
    for node in nodes:
        for name in filter(None, node.output):
            home[name] = home[node.input[0]] if node.op_type in VIEWS else name
    outside = {*graph.inputs, *graph.outputs, *constants}
    last = {home[name]: index for index, node in enumerate(nodes) for name in filter(None, node.input)}
    live: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(nodes):
        for name in own_outputs(node, home):
            if name not in outside:
                live[name] = graph.sizes[name].bytes
        peak = max(peak, sum(live.values()) + within(node, graph))
        for name in [name for name in live if last.get(name, index) <= index]:
            del live[name]
    return peak


def within(node: onnx.NodeProto, graph: Graph) -> int:
    """Scores and softmax, in float32, of an Attention that no single kernel takes."""
    if node.op_type != "Attention":
        return 0
    (batch, heads, rows, _), keys = graph.sizes[node.input[0]].shape, graph.sizes[node.input[1]].shape[2]
    return 2 * 4 * batch * heads * rows * keys


def own_outputs(node: onnx.NodeProto, home: dict[str, str]) -> list[str]:
    """Outputs that have memory of their own."""
    return [name for name in node.output if name and home[name] == name]
