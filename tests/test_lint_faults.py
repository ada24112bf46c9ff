"""Every rule of lint is broken by one edit of a good graph that is reported once, by the node's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.lint import lint
from tests.qdq_graphs import (
    Edit,
    assign,
    blocked,
    drop_unread,
    integers,
    node_of,
    only_problem,
    put,
    read,
    scales,
    w8a8,
)


def output(model: ir.Model, name: str) -> ir.Value:
    return node_of(model, name).outputs[0]


def store(name: str, make: Callable[[np.random.Generator], NDArray[Any]]) -> Edit:
    """Another tensor under an initializer's name."""
    return lambda model, random: put(
        model, model.graph.initializers[name], ir.tensor(np.asarray(make(random)), name=name)
    )


def attribute(name: str, key: str, value: int) -> Edit:
    return lambda model, random: node_of(model, name).attributes.add(ir.AttrInt64(key, value))


def rewire(name: str, index: int, source: str | None) -> Edit:
    """An input of a node comes from another node, or from nowhere."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        node_of(model, name).replace_input_with(index, output(model, source) if source else None)
        drop_unread(model)

    return edit


def append(operator: str, name: str, *sources: str, domain: str = "") -> Edit:
    """One more node, whose result is an output of the graph."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        node = ir.node(operator, [output(model, source) for source in sources], domain=domain, name=name)
        node.outputs[0].name = name
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])

    return edit


def expose(name: str) -> Edit:
    return lambda model, random: model.graph.outputs.append(output(model, name))


def scale_of(value: float) -> Edit:
    return store("a_scale", lambda random: np.array(value, np.float32))


def to_float(random: np.random.Generator) -> NDArray[np.float32]:
    return random.normal(size=(32, 48)).astype(np.float32)


def float_weight(model: ir.Model, random: np.random.Generator) -> None:
    read("h", 1, to_float)(model, random)
    drop_unread(model)


def bias_in_integers(model: ir.Model, random: np.random.Generator) -> None:
    """As ONNX Runtime's quantiser writes biases."""
    node = ir.node("DequantizeLinear", [ir.Value(name="b"), ir.Value(name="b_scale")], {"axis": 0}, name="b_dq")
    for value, array in zip(node.inputs, (integers(random, 40).astype(np.int32), scales(random, 40)), strict=True):
        assert value is not None
        put(model, value, ir.tensor(array, name=value.name))
    model.graph.insert_before(node_of(model, "y"), node)
    node_of(model, "y").replace_input_with(2, node.outputs[0])


def quantised_while_running(model: ir.Model, random: np.random.Generator) -> None:
    """As quantisation-aware training writes weights."""
    values = [ir.Value(name=name) for name in ("f", "f_scale", "f_zero")]
    arrays: list[NDArray[Any]] = [to_float(random), scales(random), np.array(0, np.int8)]
    for value, array in zip(values, arrays, strict=True):
        put(model, value, ir.tensor(array, name=value.name))
    quantize = ir.node("QuantizeLinear", values, name="f_q")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *values[1:]], name="f_dq")
    model.graph.insert_before(node_of(model, "h"), [quantize, dequantize])
    node_of(model, "h").replace_input_with(1, dequantize.outputs[0])
    drop_unread(model)


def only_add_reads(model: ir.Model, random: np.random.Generator) -> None:
    """Input of the first layer back in float, its activation pair used for an addition, its weight in float."""
    append("Add", "sum", "x_dq", "x_dq")(model, random)
    node_of(model, "h").replace_input_with(0, model.graph.inputs[0])
    read("h", 1, to_float)(model, random)
    drop_unread(model)


def blocks_of_a_kernel(model: ir.Model, random: np.random.Generator) -> None:
    attribute("k_dq", "block_size", 16)(model, random)
    rewire("c", 0, None)(model, random)
    node_of(model, "c").replace_input_with(0, model.graph.inputs[1])
    drop_unread(model)


def three_axes(model: ir.Model, random: np.random.Generator) -> None:
    store("v", lambda random: integers(random, 2, 48, 32, bits=4).astype(ml_dtypes.int4))(model, random)
    store("v_scale", lambda random: scales(random, 2, 3, 32))(model, random)
    attribute("v_dq", "axis", 1)(model, random)


W8A8: dict[str, tuple[Edit, str, str]] = {
    "a weight's zero point is not zero": (assign("w_zero", 7, 3), "DequantizeLinear w_dq", "zero point 3"),
    "an activation's zero point is not zero": (assign("x_zero", (), -5), "QuantizeLinear x_q", "zero point -5"),
    "a zero point of another dtype": (
        store("w_zero", lambda random: np.zeros(48, np.uint8)),
        "DequantizeLinear w_dq",
        "uint8",
    ),
    "a zero point of another shape": (
        store("w_zero", lambda random: np.zeros((), np.int8)),
        "DequantizeLinear w_dq",
        "shape []",
    ),
    "an infinite scale": (scale_of(np.inf), "QuantizeLinear a_q", "scale inf"),
    "a scale that is no number": (scale_of(np.nan), "QuantizeLinear a_q", "scale nan"),
    "a zero scale": (scale_of(0.0), "QuantizeLinear a_q", "scale 0"),
    "a negative scale": (scale_of(-0.5), "QuantizeLinear a_q", "scale -0.5"),
    "a subnormal scale": (scale_of(1e-39), "QuantizeLinear a_q", "scale 1e-39"),
    "a subnormal scale in float16": (
        store("v_scale", lambda random: np.full(40, 2e-5, np.float16)),
        "DequantizeLinear v_dq",
        "scale 2.0",
    ),
    "one bad scale of a weight": (assign("w_scale", 11, np.nan), "DequantizeLinear w_dq", "scale nan"),
    "a scale in float64": (
        store("v_scale", lambda random: scales(random, 40).astype(np.float64)),
        "DequantizeLinear v_dq",
        "double",
    ),
    "an activation with a scale for every channel": (
        store("x_scale", lambda random: scales(random, 32)),
        "QuantizeLinear x_q",
        "[32]",
    ),
    "a pair with two scales": (read("x_dq", 1, scales), "DequantizeLinear x_dq", "another scale"),
    "a DQ that only Add reads": (only_add_reads, "DequantizeLinear x_dq", "values for Add, Add"),
    "a DQ that nobody reads": (
        lambda model, random: model.graph.append(
            ir.node("DequantizeLinear", node_of(model, "x_dq").inputs, name="unread")
        ),
        "DequantizeLinear unread",
        "nobody",
    ),
    "a DQ that is the graph's output alone": (
        append("DequantizeLinear", "seen", "x_q"),
        "DequantizeLinear seen",
        "the graph's output",
    ),
    "a Q that another node reads too": (append("Abs", "positive", "x_q"), "QuantizeLinear x_q", "Abs"),
    "a Q that the graph returns": (expose("x_q"), "QuantizeLinear x_q", "the graph's output"),
    "an int8 weight and a float activation": (rewire("y", 0, "a"), "Gemm y", "other and eight bits"),
    "an activation in eight bits and a float weight": (float_weight, "MatMul h", "eight bits and other"),
    "a weight quantised while running": (quantised_while_running, "DequantizeLinear f_dq", "while running"),
    "scales along the input channels": (attribute("w_dq", "axis", 0), "DequantizeLinear w_dq", "axis 0"),
    "scales along a kernel's input channels": (attribute("k_dq", "axis", 1), "DequantizeLinear k_dq", "axis 1"),
    "scales along a transposed weight's input channels": (
        attribute("v_dq", "axis", -1),
        "DequantizeLinear v_dq",
        "axis 1",
    ),
    "one scale for a whole weight": (store("v_scale", scales), "DequantizeLinear v_dq", "shape []"),
    "fewer scales than channels": (
        store("k_scale", lambda random: scales(random, 3)),
        "DequantizeLinear k_dq",
        "shape [3]",
    ),
    "the weight -128": (assign("w", (3, 4), -128), "DequantizeLinear w_dq", "-128"),
    "an integer bias": (bias_in_integers, "DequantizeLinear b_dq", "int32"),
    "a weight in uint8": (
        store("v", lambda random: random.integers(0, 255, (40, 48)).astype(np.uint8)),
        "DequantizeLinear v_dq",
        "uint8",
    ),
    "an activation in uint8": (
        store("x_zero", lambda random: np.array(0, np.uint8)),
        "QuantizeLinear x_q",
        "uint8 values",
    ),
    "a Q that does not say int8": (attribute("a_q", "output_dtype", 0), "QuantizeLinear a_q", "uint8 values"),
    "blocks in a kernel": (blocks_of_a_kernel, "DequantizeLinear k_dq", "[6, 3, 4, 4]"),
    "an operator of ONNX Runtime alone": (
        append("FastGelu", "fast", "z", domain="com.microsoft"),
        "FastGelu fast",
        "com.microsoft",
    ),
    "an own operator without a body": (append("GatherPool", "pool", "z", domain="linvt"), "GatherPool pool", "body"),
    "an operator outside the table": (append("Det", "det", "h"), "Det det", "outside the table"),
}

BLOCKED: dict[str, tuple[Edit, str, str]] = {
    "a zero point of a block": (assign("w_zero", (2, 5), 1), "DequantizeLinear w_dq", "zero point 1"),
    "a bad scale of a block": (assign("w_scale", (1, 1), np.inf), "DequantizeLinear w_dq", "scale inf"),
    "scales of another shape": (
        store("w_scale", lambda random: scales(random, 48, 4)),
        "DequantizeLinear w_dq",
        "shape [48, 4]",
    ),
    "input channels that do not fill blocks": (
        attribute("v_dq", "block_size", 32),
        "DequantizeLinear v_dq",
        "48 input channels",
    ),
    "blocks of 8": (attribute("w_dq", "block_size", 8), "DequantizeLinear w_dq", "block_size 8"),
    "blocks of 24": (attribute("v_dq", "block_size", 24), "DequantizeLinear v_dq", "block_size 24"),
    "int4 without blocks": (attribute("w_dq", "block_size", 0), "DequantizeLinear w_dq", "block_size 0"),
    "blocks along the output channels": (attribute("w_dq", "axis", 1), "DequantizeLinear w_dq", "axis 1"),
    "int4 with an odd row": (
        store("w", lambda random: integers(random, 64, 47, bits=4).astype(ml_dtypes.int4)),
        "DequantizeLinear w_dq",
        "47 int4",
    ),
    "int4 with three axes": (three_axes, "DequantizeLinear v_dq", "[2, 48, 32]"),
}


@pytest.mark.parametrize("name", W8A8)
def test_one_fault_of_an_eight_bit_graph_is_one_problem(name: str, random: np.random.Generator) -> None:
    edit, node, words = W8A8[name]
    model = w8a8(random)
    edit(model, random)
    line = only_problem(lint(model, floats=["own"]))
    assert line.startswith(f"{node}: found ")
    assert words in line.split(", expected ")[0]


@pytest.mark.parametrize("name", BLOCKED)
def test_one_fault_of_a_blocked_graph_is_one_problem(name: str, random: np.random.Generator) -> None:
    edit, node, words = BLOCKED[name]
    model = blocked(random)
    edit(model, random)
    line = only_problem(lint(model))
    assert line.startswith(f"{node}: found ")
    assert words in line.split(", expected ")[0]


def test_weights_in_blocks_may_be_minus_128(random: np.random.Generator) -> None:
    model = blocked(random)
    assign("v", (3, 4), -128)(model, random)
    assert lint(model)


def test_one_pair_may_serve_several_layers_and_more(random: np.random.Generator) -> None:
    model = w8a8(random)
    append("MatMul", "again", "x_dq", "w_dq")(model, random)
    append("Add", "sum", "x_dq", "x_dq")(model, random)
    assert lint(model)
