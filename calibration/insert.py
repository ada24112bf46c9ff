"""Put 8-bit and 4-bit layers into a graph, in standard ONNX operators.

8 bits (W8A8): x -> QuantizeLinear -> DequantizeLinear -> MatMul, and DequantizeLinear(int8 weight, a scale a column);
symmetric, zero point 0, the product's output and its bias in floating point. ONNX Runtime makes of it
one MatMulIntegerToFloat, TensorRT one 8-bit GEMM. 4 bits: DequantizeLinear(int4 weight, a scale for every block of
rows) -> MatMul.

onnxruntime.quantization places the same nodes for W8A8 (the tests hold this against it) but takes a model as one
protobuf message, at most 2 GiB with its weights, whose weights are float32; here a graph may be of any size, with
weights in 16 bits on disk that are read one by one when the file is written.
Chooses no scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.blocks import Blocks
from calibration.linears import Linear, constant_behind, floats, matrix, prune, replace_constant

__all__ = ["Factors", "columns_quantized", "insert_int4", "insert_int8", "scaled_weight"]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]

LEVELS = 127  # -128 is not used: TensorRT's weights are symmetric


@dataclass(frozen=True)
class Factors:
    """Powers of two by which rows and columns of a weight are multiplied, from smoothing."""

    rows: Exponents | None = None
    columns: Exponents | None = None


def scaled_weight(weight: Floats, factors: Factors) -> Floats:
    """W (K, N) -> 2^rows * W * 2^columns."""
    if factors.rows is not None:
        weight = np.ldexp(weight, factors.rows.astype(np.int32)[:, None])
    if factors.columns is not None:
        weight = np.ldexp(weight, factors.columns.astype(np.int32))
    return weight


def columns_quantized(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """W (K, N) -> int8 (K, N) and a scale (N,) for every column: the largest magnitude is 127."""
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest / LEVELS > np.finfo(np.float32).tiny, largest / np.float32(LEVELS), np.float32(1))
    values = np.rint(weight / scales).clip(-LEVELS, LEVELS).astype(np.int8)
    return values, scales.astype(np.float32)


def insert_int8(
    model: ir.Model,
    layers: Mapping[str, Linear],
    scales: Mapping[str, float],
    factors: Mapping[str, Factors],
    dtype: ir.DataType,
) -> None:
    """Quantise ``layers`` of a graph in place.

    Args:
        model: the graph.
        layers: what to quantise, by name.
        scales: of the activations they read, by the tensor's name.
        factors: of their weights, by the layer's name.
        dtype: what the graph computes in.
    """
    quantized: dict[str, ir.Value] = {}
    for name, linear in layers.items():
        source = linear.node.inputs[0]
        assert source is not None and source.name is not None
        if source.name not in quantized:
            quantized[source.name] = quantized_activation(model.graph, linear.node, source, scales[source.name], dtype)
        weight = quantized_weight(model.graph, linear, name, factors.get(name, Factors()), dtype)
        linear.node.replace_input_with(0, quantized[source.name])
        linear.node.replace_input_with(1, weight)
        if is_fixed(source.shape):
            widen_bias(model.graph, linear.node)
    prune(model)


def quantized_activation(
    graph: ir.Graph, before: ir.Node, source: ir.Value, scale: float, dtype: ir.DataType
) -> ir.Value:
    """A pair of QuantizeLinear and DequantizeLinear behind ``source``; what layers read."""
    value = constant(graph, f"{source.name}.scale", np.array(scale, dtype.numpy()))
    zero = constant(graph, f"{source.name}.zero_point", np.array(0, np.int8))
    down = ir.node("QuantizeLinear", [source, value, zero])
    up = ir.node("DequantizeLinear", [down.outputs[0], value, zero])
    first = min((use.node for use in source.uses() if use.node is not down), key=_place(graph), default=before)
    graph.insert_before(first, [down, up])
    return up.outputs[0]


def _place(graph: ir.Graph) -> Callable[[ir.Node], int]:
    """Where a node stands in its graph."""
    places = {node: index for index, node in enumerate(graph)}
    return lambda node: places[node]


def quantized_weight(graph: ir.Graph, linear: Linear, name: str, factors: Factors, dtype: ir.DataType) -> ir.Value:
    """A layer's weight as int8 with a scale for every column."""
    source = constant_behind(linear.node.inputs[1])
    assert source is not None and source.const_value is not None
    tensor = source.const_value  # the value itself leaves the graph
    scales = columns_quantized(scaled_weight(floats(tensor), factors))[1]

    def values() -> ir.Tensor[NDArray[np.int8]]:
        return ir.Tensor(columns_quantized(scaled_weight(floats(tensor), factors))[0], name=f"{name}.int8")

    shape = ir.Shape(linear.shape)
    lazy = ir.LazyTensor(values, dtype=ir.DataType.INT8, shape=shape, name=f"{name}.int8")
    stored = ir.Value(name=lazy.name, shape=shape, type=ir.TensorType(ir.DataType.INT8), const_value=lazy)
    graph.register_initializer(stored)
    scale = constant(graph, f"{name}.scale", scales.astype(dtype.numpy()))
    zero = constant(graph, f"{name}.zero_point", np.zeros(len(scales), np.int8))
    node = ir.node("DequantizeLinear", [stored, scale, zero], {"axis": 1})
    graph.insert_before(linear.node, node)
    return node.outputs[0]


def is_fixed(shape: ir.Shape | None) -> bool:
    """Whether no axis is free, as far as is known."""
    return shape is None or all(isinstance(axis, int) for axis in shape)


def widen_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Bias (N,) -> (1, N): the same sum.

    Around a product of fixed shape with a bias (N,) ONNX Runtime 1.32 makes a Gemm between Reshapes, and loses the type
    of the quantised activation on the way: it then refuses to load the graph. Where an axis is free the bias stays as it
    is, for there it fuses with a Gelu behind it.
    """
    uses = tuple(product.outputs[0].uses())
    adder = uses[0].node if len(uses) == 1 else None
    if adder is None or adder.op_type != "Add":
        return
    for index, value in enumerate(adder.inputs):
        bias = constant_behind(value)
        if bias is not None and bias.shape is not None and len(bias.shape) == 1:
            replace_constant(graph, adder, index, f"{bias.name}.row", matrix(value)[None])


def insert_int4(
    model: ir.Model, layers: Mapping[str, Linear], blocks: Mapping[str, Blocks], dtype: ir.DataType
) -> None:
    """Replace the weights of ``layers`` by ``blocks`` in place; activations stay as they are."""
    for name, linear in layers.items():
        linear.node.replace_input_with(1, block_weight(model.graph, linear, name, blocks[name], dtype))
    prune(model)


def block_weight(graph: ir.Graph, linear: Linear, name: str, blocks: Blocks, dtype: ir.DataType) -> ir.Value:
    """A layer's weight as int4, or int8, with a scale for every block of rows."""
    narrow = ir.DataType.INT4 if blocks.bits == 4 else ir.DataType.INT8
    array = blocks.values.astype(ml_dtypes.int4) if blocks.bits == 4 else blocks.values
    kind = f"int{blocks.bits}"
    tensor = ir.Tensor(array, dtype=narrow, name=f"{name}.{kind}")
    shape = ir.Shape(blocks.values.shape)
    stored = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(narrow), const_value=tensor)
    graph.register_initializer(stored)
    scale = constant(graph, f"{name}.scale", blocks.scales.astype(dtype.numpy()))
    attributes = {"axis": 0, "block_size": blocks.block}
    node = ir.node("DequantizeLinear", [stored, scale], attributes)
    graph.insert_before(linear.node, node)
    return node.outputs[0]


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A named initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
