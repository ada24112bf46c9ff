"""Whether a graph is quantised in the form that TensorRT takes, what was left in float, and which versions take it.

The rules of quantisation are in ``qdq_rules``, those of operators and versions in ``trt_rules``.

Reads weights where they lie and changes nothing. Does not run the graph: how accurate it is, a comparison says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from calibration.qdq_rules import DEQUANTIZE, QUANTIZE, SCALES, is_layer, node_problems, stored
from calibration.trt_rules import constant, operator_problems, supports

__all__ = ["Lint", "infinite_constants", "lint"]

FLOATS = (*SCALES, ir.DataType.DOUBLE)
SMALLEST = 1024  # elements: below, a float weight is not worth a word
PIECE = 2**20  # elements of a weight that are looked at together


@dataclass(frozen=True)
class Lint:
    """What was found in one graph; true when nothing is wrong.

    Attributes:
        problems: one line each: node, found, expected.
        quantized_bytes: initializers that QuantizeLinear and DequantizeLinear read, scales included.
        float_bytes: all other float initializers.
        left: name, bytes and consumer of every float weight of ``SMALLEST`` elements or more that a layer reads.
        supports: TensorRT version -> "as written", or what has to be lowered for it.
    """

    problems: tuple[str, ...]
    quantized_bytes: int
    float_bytes: int
    left: tuple[tuple[str, int, str], ...]
    supports: dict[str, str]

    def __bool__(self) -> bool:
        return not self.problems


def lint(model: ir.Model, *, floats: Collection[str] = (), infinite: Collection[str] = ()) -> Lint:
    """Check one graph; ``floats`` names the weights that are meant to stay in float, ``infinite`` the masks in it."""
    nodes = list(model.graph.all_nodes())
    left = float_weights(nodes)
    problems = [*operator_problems(model)]
    for node in nodes:
        problems += node_problems(node)
    problems += value_problems(model, infinite)
    problems += [
        f"{layer} of {name}: found {size} bytes left in float by accident, expected int8, int4 or a name in floats"
        for name, size, layer in left
        if name not in floats
    ]
    return Lint(tuple(problems), *sizes(model), left, supports(model))


def value_problems(model: ir.Model, meant: Collection[str]) -> Iterator[str]:
    """Float constants that are not finite; scales of QuantizeLinear and DequantizeLinear have a rule of their own."""
    for name in infinite_constants(model):
        if name not in meant:
            yield f"constant {name}: found values that are not finite, expected finite numbers"


def infinite_constants(model: ir.Model) -> Iterator[str]:
    """Names of float constants that hold an infinite value or one that is no number, scales left out."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for name, value in graph.initializers.items():
            scale = any(is_operand(use.node, use.idx) for use in value.uses())
            if value.const_value is not None and not scale and not is_finite(value.const_value):
                yield name
    for function in (model.graph, *(function.graph for function in model.functions.values())):
        for node in function.all_nodes():
            if node.op_type == "Constant" and not all(map(is_finite, constants_of(node))):
                yield str(node.outputs[0].name)


def constants_of(node: ir.Node) -> Iterator[ir.TensorProtocol]:
    """What a Constant node holds, in one of three forms; there are more, which are not of floats."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.as_tensor()
        elif attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
            yield ir.tensor(np.array(attribute.value, np.float32))


def is_finite(tensor: ir.TensorProtocol) -> bool:
    """Whether no element is infinite or no number; a large tensor in a file is read in pieces."""
    if tensor.dtype not in FLOATS:
        return True
    values = tensor.numpy().reshape(-1)
    pieces = (values[start : start + PIECE] for start in range(0, values.size, PIECE))
    return all(np.isfinite(piece.astype(np.float64)).all() for piece in pieces)


def float_weights(nodes: Sequence[ir.Node]) -> tuple[tuple[str, int, str], ...]:
    """Name, bytes and first consumer of the float weights of layers, in the graph's order."""
    found: dict[str, tuple[str, int, str]] = {}
    for node in nodes:
        source = weight_of(node) if is_layer(node) else None
        tensor = constant(source)
        if source is not None and tensor is not None and tensor.dtype in FLOATS and tensor.size >= SMALLEST:
            name = str(source.name)
            found.setdefault(name, (name, tensor.nbytes, node.op_type))
    return tuple(found.values())


def weight_of(layer: ir.Node) -> ir.Value | None:
    """The constant a layer multiplies with; beside a weight a constant first input is data, such as learned queries."""
    first, second = (stored(value) for value in layer.inputs[:2])
    producer = second.producer() if second is not None else None
    return first if constant(second) is None and (producer is None or producer.op_type != DEQUANTIZE) else second


def sizes(model: ir.Model) -> tuple[int, int]:
    """Bytes of initializers that belong to Q and DQ nodes, and of the other float ones."""
    quantized = floating = 0
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            if any(is_operand(use.node, use.idx) for use in value.uses()):
                quantized += tensor.nbytes
            elif tensor.dtype in FLOATS:
                floating += tensor.nbytes
    return quantized, floating


def is_operand(node: ir.Node, index: int) -> bool:
    """Whether an initializer there is part of the quantised form: integers, a scale or a zero point."""
    return node.op_type == DEQUANTIZE or (node.op_type == QUANTIZE and index > 0)
