"""Bytes of weights that an engine holds, from the graph it is built of.

The file's size says little: half-size weights behind a Cast are folded to what they are cast to, while INT8 and INT4
weights stay as they are where the product takes them so. INT8 weights whose product has a floating-point input may be
folded to floating point, so they count as that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from calibration.linears import SMALLEST
from export.engine.sizes import Graph

__all__ = ["MOVES", "Layer", "Weights", "constant_names", "engine_weights"]

MOVES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")  # the same elements elsewhere
PRODUCTS = ("MatMul", "Gemm", "Conv")
COMPUTED = (
    *PRODUCTS,
    "Attention",
    "Einsum",
    "LayerNormalization",
    "RMSNormalization",
    "Softmax",
)  # not folded for sure
INT4 = (ir.DataType.INT4, ir.DataType.UINT4)
INT8 = (ir.DataType.INT8, ir.DataType.UINT8)


@dataclass(frozen=True)
class Layer:
    """The weight (rows, columns) of a linear layer that is quantised, or can be.

    Attributes:
        bytes: with its scales.
        narrow: it is quantised.
    """

    rows: int
    columns: int
    bytes: int
    narrow: bool = False


@dataclass(frozen=True)
class Weights:
    """An engine's weights.

    Attributes:
        layers: those that are quantised or would be.
        other: bytes of everything else.
    """

    layers: tuple[Layer, ...]
    other: int

    @property
    def narrow(self) -> int:
        """Bytes of quantised layers."""
        return sum(layer.bytes for layer in self.layers if layer.narrow)

    @property
    def linear(self) -> int:
        """Bytes of layers in floating point."""
        return sum(layer.bytes for layer in self.layers if not layer.narrow)

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.narrow + self.linear + self.other


def engine_weights(graph: Graph) -> Weights:
    """What a graph's constants become."""
    constants = constant_names(graph)
    producers = {name: node for node in graph.nodes for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.nodes:
        if not is_folded(node, constants):
            for name in filter(None, node.input):
                users[name].append(node)
    depending = depending_names(graph)
    layers, other = [], 0
    for name in sorted(constants & (users.keys() | set(graph.outputs))):
        shape, size = graph.sizes[name].shape, graph.sizes[name].bytes
        quantized = dequantized(name, producers)
        products = [node for node in users[name] if node.op_type in PRODUCTS and is_second(node, name)]
        narrow = quantized is not None and stays_narrow(graph, quantized, products, producers)
        if quantized is not None and narrow:
            size = sum(graph.sizes[part].bytes for part in quantized.input if part)
        if narrow or any(is_layer(graph, node, depending) for node in products):
            rows = math.prod(shape[:-1])
            layers.append(Layer(rows, math.prod(shape) // max(rows, 1), size, narrow))
        else:
            other += size
    return Weights(tuple(layers), other)


def constant_names(graph: Graph) -> set[str]:
    """Constants, and what is made of them alone."""
    names = set(graph.constants)
    for node in graph.nodes:
        if is_folded(node, names):
            names.update(node.output)
    return names


def is_folded(node: onnx.NodeProto, constants: Iterable[str]) -> bool:
    """Whether an engine holds a node's outputs in place of its inputs, which are all constants."""
    given = [name for name in node.input if name]
    return bool(given) and node.op_type not in COMPUTED and all(name in constants for name in given)


def depending_names(graph: Graph) -> set[str]:
    """What is computed from the graph's inputs; engines compute everything else once."""
    names = set(graph.inputs) - graph.constants
    for node in graph.nodes:
        if not names.isdisjoint(node.input):
            names.update(node.output)
    return names


def is_layer(graph: Graph, product: onnx.NodeProto, depending: Iterable[str]) -> bool:
    """Whether calibration would quantise a product with a constant; ``calibration.linears`` has the rules."""
    source, weight = product.input[:2]
    shape = graph.sizes[weight].shape
    if product.op_type != "MatMul" or source not in depending or len(graph.sizes[source].shape) == 1:
        return False
    return len(shape) == 2 and min(shape) >= SMALLEST


def dequantized(name: str, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The DequantizeLinear that gives a constant, however it was moved since."""
    node = producers.get(name)
    while node is not None and node.op_type in MOVES:
        node = producers.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def stays_narrow(
    graph: Graph, quantized: onnx.NodeProto, products: list[onnx.NodeProto], producers: dict[str, onnx.NodeProto]
) -> bool:
    """Whether an engine multiplies with the quantised weight itself."""
    dtype = graph.sizes[quantized.input[0]].dtype
    if dtype in INT4:
        return True
    sources = [producers.get(node.input[0]) for node in products]
    return dtype in INT8 and all(node is not None and node.op_type == "DequantizeLinear" for node in sources)


def is_second(node: onnx.NodeProto, name: str) -> bool:
    """Whether a tensor is a product's weight, not its bias."""
    return len(node.input) > 1 and node.input[1] == name
