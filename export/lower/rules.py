"""What one release's parser would refuse in a graph as it stands: operators, dtypes, limits of single nodes, opset.

The limits are in ``export.lower.limits``, operators and dtypes in ``calibration.trt_rules``.

Reads no weights and changes nothing. Passing says that the parser takes the graph, not that an engine can be built.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from calibration.trt_rules import OPERATORS, every_node, operator_problems, problem, target_opset
from export.lower.limits import LIMITS, dtype_of
from export.lower.release import Release

__all__ = ["graph_problems"]


def graph_problems(model: ir.Model, release: Release) -> Iterator[str]:
    """One line for everything that ``release`` would refuse; types have been inferred where they can be."""
    opset, newest = model.opset_imports.get("", 0), target_opset(model, release.rules)
    if opset > newest:
        yield f"graph: found opset {opset}, expected at most {newest}"
    yield from operator_problems(model)
    lacking = set()
    for node in every_node(model):
        if node.domain or node.op_type not in OPERATORS:
            continue  # said above
        if node.op_type in release.operators:
            yield from node_problems(node, release)
        elif node.op_type not in lacking:
            lacking.add(node.op_type)
            yield problem(node, f"an operator that TensorRT {release.version} lacks", "it lowered")


def node_problems(node: ir.Node, release: Release) -> Iterator[str]:
    """One node of a known operator: its dtype, else its limits."""
    allowed = release.operators[node.op_type]
    found = next((dtype for dtype in dtypes(node) if dtype is not None and dtype not in allowed), None)
    if found is not None:
        names = ", ".join(sorted(dtype.name.lower() for dtype in allowed))
        yield problem(node, f"values of {found.name.lower()}", f"one of {names}")
    elif rule := LIMITS.get(node.op_type):
        yield from rule(node, release)


def dtypes(node: ir.Node) -> Iterator[ir.DataType | None]:
    """The dtypes that an operator works on: its first input's (for Where the second's), and what it makes."""
    index = 1 if node.op_type == "Where" else 0
    if len(node.inputs) > index and node.op_type != "ConstantOfShape":
        yield dtype_of(node.inputs[index])
    if node.op_type == "Cast":
        yield ir.DataType(node.attributes.get_int("to", 0))
    elif node.op_type == "Constant":
        yield dtype_of(node.outputs[0])
    elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
        yield node.attributes["value"].as_tensor().dtype
