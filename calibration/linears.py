"""Which layers of a graph can be quantised: products of an activation with a constant matrix.

A weight may be stored in 16 bits behind a Cast. Reads graphs; the only edit is the folding of products of two
constants, which would otherwise be computed in every run and counted as layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "Linear",
    "constant",
    "constant_behind",
    "exempt_weights",
    "floats",
    "fold_constant_products",
    "free_name",
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
    uses: Counter[str] = Counter()
    depending = depending_values(model.graph)
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        source, stored = node.inputs[0], constant_behind(node.inputs[1])
        if stored is None or source not in depending or is_vector(source) or not is_large_matrix(stored):
            continue
        assert stored.name is not None
        uses[stored.name] += 1
        name = f"{stored.name}#{uses[stored.name]}" if uses[stored.name] > 1 else stored.name
        found[name] = Linear(name, node)
    return found


def exempt_weights(model: ir.Model) -> set[str]:
    """Weights that are no layers on purpose: of convolutions, of small products, and of what engines compute once."""
    depending = depending_values(model.graph)
    found = set()
    for node in model.graph:
        stored = constant_behind(node.inputs[1]) if len(node.inputs) > 1 else None
        if stored is None or stored.name is None:
            continue
        source = node.inputs[0]
        free = node.op_type == "MatMul" and (source not in depending or is_vector(source))
        small = node.op_type in ("MatMul", "Gemm") and not is_large_matrix(stored)
        if node.op_type == "Conv" or free or small:
            found.add(stored.name)
    return found


def depending_values(graph: ir.Graph) -> set[ir.Value | None]:
    """Values computed from the graph's inputs; engines compute all others once, while loading."""
    found: set[ir.Value | None] = set(graph.inputs)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def grouped(linears: Iterable[Linear]) -> dict[str, list[Linear]]:
    """Layers by the activation they share."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.activation, []).append(linear)
    return groups


def is_vector(value: ir.Value | None) -> bool:
    """Whether a tensor is known to have one axis; ONNX Runtime 1.32 does not load its product in 8 bits."""
    return value is not None and value.shape is not None and len(value.shape) == 1


def is_large_matrix(stored: ir.Value) -> bool:
    """Whether it is a matrix with a shape worth quantising."""
    shape = stored.shape.numpy() if stored.shape is not None else ()
    return len(shape) == 2 and min(shape) >= SMALLEST


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """The initializer that ``value`` is, or is a Cast of; one that callers may replace is no constant."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        value = producer.inputs[0]
    return value if value is not None and value.is_initializer() and not value.is_graph_input() else None


def matrix(value: ir.Value | None) -> Floats:
    """A constant's numbers in float32."""
    stored = constant_behind(value)
    assert stored is not None and stored.const_value is not None, "the caller looks for constants"
    return floats(stored.const_value)


def floats(tensor: ir.TensorProtocol) -> Floats:
    """A tensor's numbers in float32."""
    return np.ascontiguousarray(tensor.numpy()).astype(np.float32, copy=False)


def replace_constant(graph: ir.Graph, node: ir.Node, index: int, name: str, values: Floats) -> None:
    """Give ``node`` another constant as input ``index``: stored, and cast, as the one before where no bit is lost."""
    before = node.inputs[index]
    stored = constant_behind(before)
    assert before is not None and stored is not None and before.dtype is not None and stored.dtype is not None
    with np.errstate(over="ignore"):
        narrow = values.astype(stored.dtype.numpy())
    exact = np.array_equal(narrow.astype(np.float32), values, equal_nan=True)
    array = narrow if exact else values.astype(before.dtype.numpy())
    value = constant(graph, name, array)
    if value.dtype != before.dtype:
        cast = ir.node("Cast", [value], {"to": before.dtype.value})
        value = cast.outputs[0]
        value.name, value.shape, value.type = f"{name}.cast", ir.Shape(array.shape), ir.TensorType(before.dtype)
        graph.insert_before(node, cast)
    node.replace_input_with(index, value)


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new initializer; its name says which if ``name`` is taken."""
    name = free_name(graph, name)
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def free_name(graph: ir.Graph, name: str) -> str:
    """``name``, or with the first number behind it that no initializer has."""
    count = 1
    free = name
    while free in graph.initializers:
        count += 1
        free = f"{name}#{count}"
    return free


def fold_constant_products(model: ir.Model) -> None:
    """MatMul(constant, constant) -> its result, as an initializer of the dtype the product had."""
    for node in list(model.graph):
        first, second = (constant_behind(value) for value in (*node.inputs, None, None)[:2])
        if node.op_type != "MatMul" or node.domain or first is None or second is None:
            continue
        product = node.outputs[0]
        if product.dtype is None or not product.dtype.is_floating_point() or product.is_graph_output():
            continue
        values = (matrix(node.inputs[0]).astype(np.float64) @ matrix(node.inputs[1])).astype(product.dtype.numpy())
        product.replace_all_uses_with(constant(model.graph, f"{product.name}.folded", np.asarray(values)))
        model.graph.remove(node, safe=True)
    prune(model)


def prune(model: ir.Model) -> None:
    """Remove Casts and initializers that nothing reads."""
    for node in reversed(list(model.graph)):
        if node.op_type == "Cast" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)
