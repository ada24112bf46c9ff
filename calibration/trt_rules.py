"""Which operators TensorRT's ONNX parser takes, since which version, and what a graph needs lowered for an older one.

Versions are those that users have: JetPack 6 (10.3), 7.0 (10.13), 7.2 (10.16) and the newest (11.4). Source: the table
of operators ``docs/operators.md`` of onnx/onnx-tensorrt for 10.1 and 10.15, its ``docs/Changelog.md`` in between.

Knows operators by name only: that ``Attention`` has to be 4-D without a cache, ``TensorScatter`` to be 4-D along axis
-2 and ``TopK`` to stay below 3840 is for those who write the graph. Does not lower anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from kernels.spec import DOMAIN

__all__ = ["BLOCKED_OPSET", "RELEASES", "constant", "is_blocked", "operator_problems", "problem", "supports"]

AS_WRITTEN = "as written"
BLOCKED_OPSET = 21  # the first with 4-bit integers and ``block_size``

# Newest documented opset: 20 for 10.1, 24 for 10.15, 25 from 11.5 on. In between nothing newer than 20 was found.
RELEASES = {"10.3": 20, "10.13": 20, "10.16": 24, "11.4": 24}

SINCE_10_0 = frozenset(
    (
        *("Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "Cast", "Ceil", "Clip", "Concat", "Constant"),
        *("ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DequantizeLinear", "Div", "Einsum", "Equal"),
        *("Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm"),
        *("Greater", "GreaterOrEqual", "GroupNormalization", "Identity", "LayerNormalization", "Less", "LessOrEqual"),
        *("Log", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Pow", "QuantizeLinear"),
        *("Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize"),
        *("Round", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sin", "Slice", "Softmax", "Split", "Sqrt"),
        *("Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where"),
    )
)
LATER = {"Attention": "10.14", "RMSNormalization": "10.15", "RotaryEmbedding": "10.15", "TensorScatter": "10.15"}


def label(node: ir.Node) -> str:
    """What a node is called in a message: its operator and its name, or its first output's."""
    return f"{node.op_type} {node.name or node.outputs[0].name}"


def problem(node: ir.Node, found: str, expected: str) -> str:
    """One line about one node."""
    return f"{label(node)}: found {found}, expected {expected}"


def operator_problems(model: ir.Model) -> Iterator[str]:
    """Operators that no TensorRT takes, each once; bodies of the model's functions count as its own nodes."""
    seen = set()
    for node in every_node(model):
        if (node.domain, node.op_type) in seen:
            continue
        seen.add((node.domain, node.op_type))
        if node.domain == DOMAIN:
            if node.op_identifier() not in model.functions:
                yield problem(node, f"{DOMAIN}::{node.op_type} without a body", "a function of this model")
        elif node.domain:
            yield problem(node, f"the domain {node.domain}", f"the standard domain or {DOMAIN}")
        elif node.op_type not in SINCE_10_0 and node.op_type not in LATER:
            yield problem(node, "an operator outside the table", "one that TensorRT's parser is known to take")


def supports(model: ir.Model) -> dict[str, str]:
    """For every version of ``RELEASES``: "as written", or what has to be lowered for it.

    4-bit and blocked ``DequantizeLinear`` exist from opset 21 on only, and 10.x parsers take them under any opset
    (``QuantDequantLinearHelper`` of 10.1 looks at types and shapes alone), so such a graph may be of opset 21 anywhere.
    """
    nodes = list(every_node(model))
    opset = model.opset_imports.get("", 0)
    blocked = any(node.op_type == "DequantizeLinear" and is_blocked(node) for node in nodes)
    used = {node.op_type for node in nodes if not node.domain}
    return {
        version: lowering(opset, max(newest, BLOCKED_OPSET if blocked else 0), used, version)
        for version, newest in RELEASES.items()
    }


def lowering(opset: int, newest: int, used: set[str], version: str) -> str:
    """What one version lacks, e.g. "opset 24 > 20; Attention, TensorScatter"."""
    missing = sorted(name for name, since in LATER.items() if name in used and ordered(since) > ordered(version))
    reasons = [f"opset {opset} > {newest}"] if opset > newest else []
    return "; ".join([*reasons, *([", ".join(missing)] if missing else [])]) or AS_WRITTEN


def is_blocked(node: ir.Node) -> bool:
    """Whether a DequantizeLinear is 4-bit or has a scale for every block."""
    source = node.inputs[0]
    tensor = constant(source)
    dtype = tensor.dtype if tensor is not None else source.dtype if source is not None else None
    return dtype in (ir.DataType.INT4, ir.DataType.UINT4) or node.attributes.get_int("block_size", 0) != 0


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node."""
    return None if value is None else ir.convenience.get_const_tensor(value)


def ordered(version: str) -> tuple[int, ...]:
    """(10, 3) for "10.3"."""
    return tuple(int(part) for part in version.split("."))


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes of the graph, of its subgraphs and of function bodies."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
