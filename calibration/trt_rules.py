"""Which operators TensorRT's ONNX parser takes, in which dtypes, since which version, and what it lacks of a graph.

Versions are those that users have: JetPack 6 (10.3), 7.0 (10.13), 7.2 (10.16) and the newest (11.4). Source: the table
of operators ``docs/operators.md`` of onnx/onnx-tensorrt for 10.1, 10.15, 10.16 and 11.1, which agree in what is listed
here, and its ``docs/Changelog.md`` in between.

Knows operators and dtypes: the limits of single nodes are in ``export.lower.rules``, quantisation in ``qdq_rules``.
Does not lower anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from kernels.spec import DOMAIN

__all__ = [
    "BLOCKED_OPSET",
    "LATER",
    "OPERATORS",
    "RELEASES",
    "constant",
    "every_node",
    "is_blocked",
    "is_known",
    "missing",
    "newest_opset",
    "operator_problems",
    "ordered",
    "problem",
    "supports",
    "target_opset",
]

AS_WRITTEN = "as written"
BLOCKED_OPSET = 21  # the first with 4-bit integers and ``block_size``
OPSETS = {"10.3": 20, "10.15": 24}  # newest opset, documented for 10.1 and from 10.15 on; nothing in between was found

FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
WHOLE = frozenset((ir.DataType.INT32, ir.DataType.INT64))
NUMBERS = FLOATS | WHOLE
BOOL = frozenset((ir.DataType.BOOL,))
EVERY = NUMBERS | BOOL
INTEGERS = frozenset((ir.DataType.INT8, ir.DataType.INT4))  # quantised; FP8 and FP4 are not ours

BY_DTYPES = {
    FLOATS: (
        *("AveragePool", "Ceil", "Clip", "Conv", "ConvTranspose", "Cos", "CumSum", "Einsum", "Erf", "Exp", "Floor"),
        *("Gelu", "Gemm", "GroupNormalization", "LayerNormalization", "Log", "MatMul", "MaxPool", "Pow"),
        *("QuantizeLinear", "Reciprocal", "Resize", "Round", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"),
        *("Attention", "RMSNormalization", "RotaryEmbedding"),
    ),
    NUMBERS: (
        *("Abs", "Add", "ArgMax", "ArgMin", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"),
        *("Min", "Mod", "Mul", "Neg", "Pad", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu"),
        *("ScatterElements", "ScatterND", "Sub", "Sum", "TopK"),
    ),
    EVERY: (
        *("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements"),
        *("GatherND", "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Trilu"),
        *("Unsqueeze", "Where"),
    ),
    BOOL: ("And", "Not", "Or"),
    INTEGERS: ("DequantizeLinear",),
    WHOLE | {ir.DataType.FLOAT}: ("Range",),  # the importer of 10.1 refuses narrow floats, whatever the table says
    FLOATS | {ir.DataType.INT32}: ("TensorScatter",),
}
OPERATORS = {name: dtypes for dtypes, names in BY_DTYPES.items() for name in names}  # dtypes of what it works on
# Attention has an importer since 10.14, whose newest opset is too old for it
LATER = dict.fromkeys(("Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"), "10.15")


def ordered(version: str) -> tuple[int, ...]:
    """(10, 3) for "10.3"."""
    return tuple(int(part) for part in version.split("."))


def newest_opset(version: str) -> int:
    """The newest opset that a version documents."""
    return [opset for since, opset in OPSETS.items() if ordered(since) <= ordered(version)][-1]


RELEASES = {version: newest_opset(version) for version in ("10.3", "10.13", "10.16", "11.4")}


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
        elif node.op_type not in OPERATORS:
            yield problem(node, "an operator outside the table", "one that TensorRT's parser is known to take")


def supports(model: ir.Model) -> dict[str, str]:
    """For every version of ``RELEASES``: "as written", or what has to be lowered for it."""
    opset = model.opset_imports.get("", 0)
    described = {}
    for version in RELEASES:
        target = target_opset(model, version)
        reasons = [f"opset {opset} > {target}"] if opset > target else []
        if lacks := missing(model, version):
            reasons.append(", ".join(lacks))
        described[version] = "; ".join(reasons) or AS_WRITTEN
    return described


def target_opset(model: ir.Model, version: str) -> int:
    """The newest opset that a graph may have for a version.

    4-bit and blocked ``DequantizeLinear`` exist from opset 21 on only, and 10.x parsers take them under any opset
    (``QuantDequantLinearHelper`` of 10.1 looks at types and shapes alone), so such a graph may be of opset 21 anywhere.
    """
    return max(newest_opset(version), BLOCKED_OPSET if is_blocked_graph(model) else 0)


def missing(model: ir.Model, version: str) -> list[str]:
    """Standard operators of a graph that a version does not know yet, sorted."""
    used = {node.op_type for node in every_node(model) if not node.domain}
    return sorted(name for name in used & LATER.keys() if not is_known(name, version))


def is_known(operator: str, version: str) -> bool:
    """Whether a version takes an operator of the table, in the opset that it takes."""
    return ordered(LATER.get(operator, "0")) <= ordered(version)


def is_blocked_graph(model: ir.Model) -> bool:
    """Whether any weight of a graph is 4-bit or has a scale for every block."""
    return any(node.op_type == "DequantizeLinear" and is_blocked(node) for node in every_node(model))


def is_blocked(node: ir.Node) -> bool:
    """Whether a DequantizeLinear is 4-bit or has a scale for every block."""
    source = node.inputs[0]
    tensor = constant(source)
    dtype = tensor.dtype if tensor is not None else source.dtype if source is not None else None
    return dtype in (ir.DataType.INT4, ir.DataType.UINT4) or node.attributes.get_int("block_size", 0) != 0


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node."""
    return None if value is None else ir.convenience.get_const_tensor(value)


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes of the graph, of its subgraphs and of function bodies."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
