"""What TensorRT asks of quantised layers: the places of QuantizeLinear and DequantizeLinear, scales and zero points.

Two forms are known. Eight bits (W8A8): Q and DQ with one scale before a layer's activation, DQ with a scale for every
output channel on its int8 weight. Weights only: DQ with a scale for every block of input channels of an int4 or int8
matrix. Layers are MatMul, Gemm and Conv; all else computes in float. Source: TensorRT's guide, "Working with Quantized
Types" (symmetric, weights in -127..127), ``QuantDequantLinearHelper`` of its ONNX parser, and the ONNX operators.

A node with several faults may show the first alone. Does not judge scales: a graph can pass and be inaccurate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from calibration.trt_rules import constant, is_blocked, problem

__all__ = ["DEQUANTIZE", "QUANTIZE", "SCALES", "is_layer", "node_problems", "stored"]

LAYERS = ("MatMul", "Gemm", "Conv")
VIEWS = ("Cast", "Transpose", "Reshape")  # a weight behind them is the layer's still
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
SMALLEST_BLOCK = 16  # rows
SCALES = {  # dtype -> its smallest normal number
    ir.DataType.FLOAT: 2.0**-126,
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.BFLOAT16: 2.0**-126,
}


def node_problems(node: ir.Node) -> Iterator[str]:
    """What is wrong with one node's part in quantisation."""
    if node.domain:
        return
    if node.op_type == QUANTIZE:
        yield from quantize_problems(node)
    elif node.op_type == DEQUANTIZE:
        yield from dequantize_problems(node)
    elif is_layer(node):
        sides = [is_eight_bit(value) for value in node.inputs[:2]]
        if sides[0] != sides[1]:
            names = ["eight bits" if side else "other" for side in sides]
            yield problem(
                node, f"inputs in {names[0]} and {names[1]}", "activation and weight in eight bits, or neither"
            )


def quantize_problems(node: ir.Node) -> Iterator[str]:
    """An activation's QuantizeLinear."""
    kind = written(node)
    if kind != ir.DataType.INT8:
        yield problem(node, f"{kind.name.lower()} values written", "int8")
    yield from scale_problems(node, ())
    yield from zero_problems(node, kind, ())
    if set(readers(node)) != {DEQUANTIZE}:
        yield problem(node, f"values for {listed(readers(node))}", "DequantizeLinear and nothing else")


def dequantize_problems(node: ir.Node) -> Iterator[str]:
    """The second half of a pair, or a weight."""
    source = node.inputs[0]
    tensor, before = constant(source), source.producer() if source is not None else None
    pair = before if before is not None and before.op_type == QUANTIZE else None
    if tensor is None and pair is None:
        yield problem(node, "values that are computed otherwise", "a constant or the output of QuantizeLinear")
    elif tensor is not None and tensor.dtype not in (ir.DataType.INT8, ir.DataType.INT4):
        yield problem(node, f"a constant of {tensor.dtype.name.lower()}", "int8 or int4 weights, biases in float")
    elif not (layers := fused(node)):
        yield problem(node, f"values for {listed(readers(node))}", f"one of {listed(LAYERS)} among the readers")
    elif tensor is None:
        assert pair is not None
        if any(index == 1 for _, index in layers) and constant(stored(pair.inputs[0])) is not None:
            yield problem(node, "a float weight quantised while running", "a stored int8 weight")
        yield from pair_problems(node, pair)
    elif any(index != 1 for _, index in layers):
        yield problem(node, "a weight as first input", "it as the second")
    elif is_blocked(node):
        yield from block_problems(node, tensor, [layer for layer, _ in layers])
    else:
        yield from channel_problems(node, tensor, [layer for layer, _ in layers])


def pair_problems(node: ir.Node, pair: ir.Node) -> Iterator[str]:
    """Q and DQ undo each other; with both zero points zero, scales are all that can differ."""
    scales = [constant(each.inputs[1]) for each in (pair, node)]
    values = [None if scale is None else scale.numpy().astype(np.float32) for scale in scales]
    if values[1] is None or (values[0] is not None and not np.array_equal(values[0], values[1], equal_nan=True)):
        yield problem(node, "another scale than its QuantizeLinear's", "one scale for the pair")
    if zero_point(node) is not zero_point(pair):
        yield from zero_problems(node, written(pair), ())


def channel_problems(node: ir.Node, tensor: ir.TensorProtocol, layers: Sequence[ir.Node]) -> Iterator[str]:
    """An int8 weight of a W8A8 layer: a scale for every output channel, symmetric values."""
    shape = tensor.shape.numpy()
    axis = node.attributes.get_int("axis", 1) % max(len(shape), 1)
    expected = {output_axis(layer, len(shape)) for layer in layers}
    if expected != {axis}:
        yield problem(node, f"scales along axis {axis}", f"axis {min(expected - {axis})}, the output channels")
        return
    yield from scale_problems(node, (shape[axis],))
    yield from zero_problems(node, tensor.dtype, (shape[axis],))
    if tensor.numpy().min(initial=0) < -127:
        yield problem(node, "the weight -128", "-127 to 127, which is symmetric")


def block_problems(node: ir.Node, tensor: ir.TensorProtocol, layers: Sequence[ir.Node]) -> Iterator[str]:
    """A weight-only layer: (K, N), a scale for every block of input channels in every column."""
    shape, block = list(tensor.shape.numpy()), node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1) % max(len(shape), 1)
    if len(shape) != 2 or any(layer.op_type == "Conv" for layer in layers):
        yield problem(node, f"blocks in a weight of shape {shape}", "a matrix that MatMul or Gemm reads")
    elif block < SMALLEST_BLOCK or block & (block - 1):
        yield problem(node, f"block_size {block}", f"a power of two from {SMALLEST_BLOCK} on")
    elif {1 - output_axis(layer, 2) for layer in layers} != {axis}:
        yield problem(node, f"blocks along axis {axis}", f"axis {1 - axis}, the input channels")
    elif shape[axis] % block:
        yield problem(node, f"{shape[axis]} input channels", f"a multiple of block_size {block}")
    elif tensor.dtype == ir.DataType.INT4 and shape[-1] % 2:
        yield problem(node, f"{shape[-1]} int4 values a row", "an even number, as two share a byte")
    else:
        shape[axis] //= block
        yield from scale_problems(node, tuple(shape))
        yield from zero_problems(node, tensor.dtype, tuple(shape))


def scale_problems(node: ir.Node, shape: tuple[int, ...]) -> Iterator[str]:
    """Scales are constants of one shape, finite, positive and not subnormal (those may be flushed to zero)."""
    scale = constant(node.inputs[1])
    if scale is None or scale.dtype not in SCALES:
        kind = "computed" if scale is None else scale.dtype.name.lower()
        yield problem(node, f"a scale that is {kind}", "a constant of float32, float16 or bfloat16")
    elif scale.shape.numpy() != shape:
        yield problem(node, f"scales of shape {list(scale.shape.numpy())}", f"{list(shape)}")
    else:
        values, smallest = scale.numpy().astype(np.float32), SCALES[scale.dtype]
        bad = values[~(np.isfinite(values) & (values >= smallest))]
        if bad.size:
            yield problem(node, f"the scale {bad[0]:g}", f"finite numbers from {smallest:.3g} on")


def zero_problems(node: ir.Node, kind: ir.DataType, shape: tuple[int, ...]) -> Iterator[str]:
    """Zero points are absent, or zeros of the quantised dtype, as many as scales."""
    value = zero_point(node)
    if value is None:
        return
    zero = constant(value)
    if zero is None or zero.dtype != kind or zero.shape.numpy() != shape:
        found = "computed" if zero is None else f"{zero.dtype.name.lower()} of shape {list(zero.shape.numpy())}"
        yield problem(node, f"a zero point that is {found}", f"{kind.name.lower()} of shape {list(shape)}")
    elif (values := zero.numpy().astype(np.int32)).any():
        yield problem(node, f"the zero point {values[values != 0][0]}", "0: TensorRT is symmetric")


def written(node: ir.Node) -> ir.DataType:
    """The dtype that a QuantizeLinear writes; ONNX makes it uint8 where nothing says otherwise."""
    zero = constant(zero_point(node))
    if zero is not None:
        return zero.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def zero_point(node: ir.Node) -> ir.Value | None:
    """The zero point of a QuantizeLinear or DequantizeLinear, where it has one."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def is_layer(node: ir.Node) -> bool:
    """Whether the node multiplies with a weight."""
    return not node.domain and node.op_type in LAYERS


def is_eight_bit(value: ir.Value | None) -> bool:
    """Whether a layer's input is dequantised for it from eight bits: an activation, or a weight without blocks."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == DEQUANTIZE and not is_blocked(node)


def fused(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The layers that take a DequantizeLinear in, as activation (0) or weight (1)."""
    return [(use.node, use.idx) for use in node.outputs[0].uses() if is_layer(use.node) and use.idx < 2]


def readers(node: ir.Node) -> list[str]:
    """Operators that read a node's first output, and whether the graph returns it."""
    output = node.outputs[0]
    return [use.node.op_type for use in output.uses()] + ["the graph's output"] * output.is_graph_output()


def listed(names: Sequence[str]) -> str:
    """Names in a message."""
    return ", ".join(names) or "nobody"


def output_axis(layer: ir.Node, rank: int) -> int:
    """Which axis of a layer's weight counts its output channels."""
    if layer.op_type == "MatMul":
        return rank - 1
    transposed = layer.attributes.get_int("transB", 0)
    return 0 if layer.op_type == "Conv" or transposed else 1


def stored(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is a view of."""
    while value is not None and (node := value.producer()) is not None and node.op_type in VIEWS:
        value = node.inputs[0]
    return value
