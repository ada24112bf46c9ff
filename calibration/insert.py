"""Put 8-bit and 4-bit layers into a graph, in standard ONNX operators.

8 bits (W8A8): x -> QuantizeLinear -> DequantizeLinear -> MatMul, and DequantizeLinear(int8 weight, a scale a column);
symmetric, zero point 0, the product's output and its bias in floating point. ONNX Runtime makes of it
one MatMulIntegerToFloat, TensorRT one 8-bit GEMM. Layers that share an activation have a pair of nodes each: on x86
ONNX Runtime fuses no layer whose QuantizeLinear has other readers, and one row through it takes 60 times as long.
4 bits: DequantizeLinear(int4 weight, a scale for every block of rows) -> MatMul.

onnxruntime.quantization places the same nodes for W8A8 (the tests hold this against it) but takes a model as one
protobuf message, at most 2 GiB with its weights, whose weights are float32; here a graph may be of any size, with
weights in 16 bits on disk that are read one by one when the file is written.
Chooses no scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.blocks import Blocks
from calibration.linears import (
    Linear,
    constant,
    constant_behind,
    floats,
    free_name,
    matrix,
    prune,
    replace_constant,
)

__all__ = ["Factors", "columns_quantized", "insert_int4", "insert_int8", "scaled_weight"]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]

LEVELS = 127  # -128 is not used: TensorRT's weights are symmetric
# What a scale may be at least: normal, for engines may take less for 0.
SMALLEST = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}


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


def columns_quantized(weight: Floats, dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[NDArray[np.int8], Floats]:
    """W (K, N) -> int8 (K, N) and a scale (N,) for every column: the largest magnitude is 127.

    Scales are float32 numbers that ``dtype`` holds and that are normal in it; 1 for a column of zeros.
    """
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, held(largest / np.float32(LEVELS), dtype), np.float32(1))
    values = np.rint(weight / scales).clip(-LEVELS, LEVELS).astype(np.int8)
    return values, scales


def held(scales: Floats, dtype: ir.DataType) -> Floats:
    """Scales as ``dtype`` holds them, in float32, and none below its smallest normal number."""
    smallest = np.float32(SMALLEST[dtype])
    found: Floats = np.maximum(scales, smallest).astype(dtype.numpy()).astype(np.float32)
    return found


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
    stored: dict[str, ir.Value] = {}
    for name, linear in layers.items():
        source = linear.node.inputs[0]
        assert source is not None and source.name is not None
        if source.name not in stored:
            scale = held(np.asarray(scales[source.name], np.float32), dtype).astype(dtype.numpy())
            stored[source.name] = constant(model.graph, f"{source.name}.scale", np.asarray(scale))
        weight = quantized_weight(model.graph, linear, name, factors.get(name, Factors()), dtype)
        linear.node.replace_input_with(0, quantized_activation(model.graph, linear, name, stored[source.name]))
        linear.node.replace_input_with(1, weight)
        if is_fixed(source.shape):
            widen_bias(model.graph, linear.node)
    prune(model)


def quantized_activation(graph: ir.Graph, linear: Linear, name: str, scale: ir.Value) -> ir.Value:
    """QuantizeLinear and DequantizeLinear before one layer; what it reads.

    A zero point of its own keeps ONNX Runtime from making one of the pairs of several layers again.
    """
    zero = constant(graph, f"{name}.input_zero_point", np.array(0, np.int8))
    down = ir.node("QuantizeLinear", [linear.node.inputs[0], scale, zero])
    up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero])
    graph.insert_before(linear.node, [down, up])
    return up.outputs[0]


def quantized_weight(graph: ir.Graph, linear: Linear, name: str, factors: Factors, dtype: ir.DataType) -> ir.Value:
    """A layer's weight as int8 with a scale for every column."""
    source = constant_behind(linear.node.inputs[1])
    assert source is not None and source.const_value is not None
    tensor = source.const_value  # the value itself leaves the graph
    scales = columns_quantized(scaled_weight(floats(tensor), factors), dtype)[1]
    narrow = free_name(graph, f"{name}.int8")

    def values() -> ir.Tensor[NDArray[np.int8]]:
        return ir.Tensor(columns_quantized(scaled_weight(floats(tensor), factors), dtype)[0], name=narrow)

    shape = ir.Shape(linear.shape)
    lazy = ir.LazyTensor(values, dtype=ir.DataType.INT8, shape=shape, name=narrow)
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
    of the quantised activation on the way: it then refuses to load the graph. Where an axis is free the bias stays as
    it is, for there it fuses with a Gelu behind it. Of an activation with two axes, which no stage has, it makes a Gemm
    in either case: right, but not in 8 bits.
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
    values, scales = held_blocks(blocks, dtype)
    narrow = values.astype(ml_dtypes.int4) if blocks.bits == 4 else values
    stored = constant(graph, f"{name}.int{blocks.bits}", narrow)
    scale = constant(graph, f"{name}.scale", scales.astype(dtype.numpy()))
    inputs = [stored, scale]
    if blocks.bits == 8:  # ONNX Runtime gives int8 weights a zero point of the wrong shape where they have none
        inputs.append(constant(graph, f"{name}.zero_point", np.zeros(scales.shape, np.int8)))
    attributes = {"axis": 0, "block_size": blocks.block}
    node = ir.node("DequantizeLinear", inputs, attributes)
    graph.insert_before(linear.node, node)
    return node.outputs[0]


def held_blocks(blocks: Blocks, dtype: ir.DataType) -> tuple[NDArray[np.int8], Floats]:
    """Values (K, N) and scales (K / block, N) of about the same weight, whose scales ``dtype`` holds."""
    scales = held(blocks.scales, dtype)
    ratios = np.repeat(blocks.scales / scales, blocks.block, axis=0)
    return np.rint(blocks.values * ratios).astype(np.int8), scales
