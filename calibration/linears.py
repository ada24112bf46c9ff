"""Which layers of a graph can be quantised: products of an activation with a constant matrix.

A weight may be stored in 16 bits behind a Cast. Reads graphs; the only edit is the folding of products of two
constants, which would otherwise be computed in every run and counted as layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "Linear",
    "constant_behind",
    "floats",
    "fold_constant_products",
    "grouped",
    "linears_of",
    "matrix",
    "prune",
    "replace_constant",
]

Floats = NDArray[np.float32]

SMALLEST = 16  # rows and columns; below, as for LinVT's score (D, 1), 8 bits save nothing


@dataclass(frozen=True)
class Linear:
    """A MatMul of an activation (..., K) with a constant (K, N).

    Attributes:
        name: of the weight.
    """

    name: str
    node: ir.Node

    @property
    def activation(self) -> str:
        """Name of the tensor that is multiplied."""
        value = self.node.inputs[0]
        assert value is not None and value.name is not None
        return value.name

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        stored = constant_behind(self.node.inputs[1])
        assert stored is not None and stored.shape is not None
        rows, columns = stored.shape.numpy()
        return rows, columns

    def weight(self) -> Floats:
        """The matrix (K, N) in float32; reads it from disk."""
        return matrix(self.node.inputs[1])


def linears_of(model: ir.Model) -> dict[str, Linear]:
    """All of them by name, in the order of the graph; a weight that is used twice counts once for every use."""
    found: dict[str, Linear] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        stored = constant_behind(node.inputs[1])
        if stored is None or constant_behind(node.inputs[0]) is not None or not is_large_matrix(stored):
            continue
        assert stored.name is not None
        again = sum(name.split("#")[0] == stored.name for name in found)
        name = f"{stored.name}#{again + 1}" if again else stored.name
        found[name] = Linear(name, node)
    return found


def grouped(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Layers by the activation they share."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.activation, []).append(linear)
    return groups


def is_large_matrix(stored: ir.Value) -> bool:
    """Whether it is a matrix with a shape worth quantising."""
    shape = stored.shape.numpy() if stored.shape is not None else ()
    return len(shape) == 2 and min(shape) >= SMALLEST


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer that ``value`` is, or is a Cast of."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() else None


def matrix(value: ir.Value | None) -> Floats:
    """A constant's numbers in float32."""
    stored = constant_behind(value)
    assert stored is not None and stored.const_value is not None, "the caller looks for constants"
    return floats(stored.const_value)


def floats(tensor: ir.TensorProtocol) -> Floats:
    """A tensor's numbers in float32."""
    return np.ascontiguousarray(tensor.numpy()).astype(np.float32, copy=False)


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, name: str, values: Floats) -> None:
    """Give ``node`` another constant as input ``index``; it is stored, and cast, as the one before."""
    before = node.inputs[index]
    stored = constant_behind(before)
    assert before is not None and stored is not None and stored.dtype is not None
    array = values.astype(stored.dtype.numpy())
    shape = ir.Shape(array.shape)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(stored.dtype), const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    if stored is not before:
        assert before.dtype is not None
        cast = ir.node("Cast", [value], {"to": before.dtype.value})
        value = cast.outputs[0]
        value.name, value.shape, value.type = f"{name}.cast", shape, ir.TensorType(before.dtype)
        graph.insert_before(node, cast)
    node.replace_input_with(index, value)


def fold_constant_products(model: ir.Model) -> None:
    """MatMul(constant, constant) -> its result, as an initializer of the dtype the product had."""
    for node in list(model.graph):
        first, second = (constant_behind(value) for value in (*node.inputs, None, None)[:2])
        if node.op_type != "MatMul" or node.domain or first is None or second is None:
            continue
        product = node.outputs[0]
        assert product.name is not None and product.dtype is not None
        values = (matrix(node.inputs[0]).astype(np.float64) @ matrix(node.inputs[1])).astype(product.dtype.numpy())
        folded = ir.Value(
            name=f"{product.name}.folded",
            shape=ir.Shape(values.shape),
            type=ir.TensorType(product.dtype),
            const_value=ir.tensor(values, name=f"{product.name}.folded"),
        )
        model.graph.register_initializer(folded)
        product.replace_all_uses_with(folded)
        model.graph.remove(node, safe=True)
    prune(model)


def prune(model: ir.Model) -> None:
    """Remove Casts and initializers that nothing reads."""
    for node in list(model.graph):
        if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)
