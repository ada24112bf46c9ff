"""Good QDQ graphs in 8 bits and in blocks of 16, edits of their parts, and the one problem that lint then finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.lint import Lint
from tests.text_graphs import model_of

Edit = Callable[[ir.Model, np.random.Generator], object]


def put(model: ir.Model, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value, value.shape, value.type = tensor, ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    if value.name not in model.graph.initializers:
        model.graph.register_initializer(value)


def integers(random: np.random.Generator, *shape: int, bits: int = 8) -> NDArray[np.int8]:
    largest = 2 ** (bits - 1) - 1
    return random.integers(-largest, largest, shape, dtype=np.int8, endpoint=True)


def scales(random: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return random.uniform(0.01, 0.1, shape).astype(np.float32)


def w8a8(random: np.random.Generator) -> ir.Model:
    """MatMul with zero points, Gemm with a transposed weight and without, Conv."""
    text = """
    net (float[rows, 32] x, float[1, 3, 8, 8] image) => (float[rows, 40] y, float[1, 6, 2, 2] z) {
        x_q = QuantizeLinear (x, x_scale, x_zero)
        x_dq = DequantizeLinear (x_q, x_scale, x_zero)
        w_dq = DequantizeLinear <axis: int = 1> (w, w_scale, w_zero)
        h = MatMul (x_dq, w_dq)
        a = Add (h, bias)
        a_q = QuantizeLinear <output_dtype: int = 3> (a, a_scale)
        a_dq = DequantizeLinear (a_q, a_scale)
        v_dq = DequantizeLinear <axis: int = 0> (v, v_scale)
        y = Gemm <transB: int = 1> (a_dq, v_dq, y_bias)
        i_q = QuantizeLinear (image, i_scale, i_zero)
        i_dq = DequantizeLinear (i_q, i_scale, i_zero)
        k_dq = DequantizeLinear <axis: int = 0> (k, k_scale)
        c = Conv <strides: ints = [4, 4]> (i_dq, k_dq)
        z = Relu (c)
    }
    """
    weights = {
        **{name: scales(random) for name in ("x_scale", "a_scale", "i_scale")},
        **{"x_zero": np.int8(0), "i_zero": np.int8(0), "w_zero": np.zeros(48, np.int8)},
        **{"w": integers(random, 32, 48), "v": integers(random, 40, 48), "k": integers(random, 6, 3, 4, 4)},
        **{"w_scale": scales(random, 48), "v_scale": scales(random, 40), "k_scale": scales(random, 6)},
        **{"bias": scales(random, 48), "y_bias": scales(random, 40)},
    }
    return model_of(text, {name: np.asarray(array) for name, array in weights.items()})


def blocked(random: np.random.Generator) -> ir.Model:
    """An int4 and an int8 layer with a scale for every 16 input channels."""
    text = """
    net (float[rows, 64] x) => (float[rows, 32] y) {
        w_dq = DequantizeLinear <axis: int = 0, block_size: int = 16> (w, w_scale, w_zero)
        h = MatMul (x, w_dq)
        v_dq = DequantizeLinear <axis: int = 0, block_size: int = 16> (v, v_scale)
        y = MatMul (h, v_dq)
    }
    """
    weights = {
        "w": integers(random, 64, 48, bits=4).astype(ml_dtypes.int4),
        "w_scale": scales(random, 4, 48),
        "w_zero": np.zeros((4, 48), ml_dtypes.int4),
        "v": integers(random, 48, 32),
        "v_scale": scales(random, 3, 32),
    }
    return model_of(text, weights)


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def assign(name: str, index: int | tuple[int, ...], value: float) -> Edit:
    """One element of an initializer."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        held = model.graph.initializers[name]
        assert held.const_value is not None
        array = held.const_value.numpy().copy()
        array[index] = value
        put(model, held, ir.tensor(array, name=name))

    return edit


def read(name: str, index: int, make: Callable[[np.random.Generator], NDArray[Any]]) -> Edit:
    """An input of a node becomes an initializer of its own."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        value = ir.Value(name="own")
        put(model, value, ir.tensor(make(random), name="own"))
        node = node_of(model, name)
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, value)

    return edit


def drop_unread(model: ir.Model) -> None:
    for node in reversed(list(model.graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            model.graph.remove(node, safe=True)


def only_problem(found: Lint) -> str:
    assert not found, found
    (line,) = found.problems
    print(line)
    assert "\n" not in line
    return line
