"""Good QDQ graphs pass, and every rule is broken by one edit that is reported once, by the node's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calibration.lint import Lint, lint

DEMO = sorted((Path(__file__).parent.parent / "runtime" / "demo" / "float").glob("*.onnx"))

Edit = Callable[[ir.Model, np.random.Generator], object]


# --- two good graphs


def model_of(text: str, weights: dict[str, NDArray[Any]], opset: int = 21) -> ir.Model:
    """A graph in ONNX's text form with its weights; nodes are called by their first output."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "linvt" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(ir.to_proto(ir.tensor(array, name=name)) for name, array in weights.items())
    model = ir.from_proto(proto)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


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


@pytest.mark.parametrize("build", [w8a8, blocked])
def test_a_good_graph_has_no_problems_and_runs(
    build: Callable[[np.random.Generator], ir.Model], random: np.random.Generator
) -> None:
    model = build(random)
    found = lint(model)
    assert found
    assert found.problems == ()
    assert found.left == ()
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        value.name: random.normal(size=[5 if n == "rows" else n for n in value.shape]) for value in session.get_inputs()
    }
    for result in session.run(None, {name: array.astype(np.float32) for name, array in feeds.items()}):
        assert np.isfinite(result).all()


def test_bytes_are_those_of_the_initializers(random: np.random.Generator) -> None:
    found = lint(w8a8(random))
    integer, scale = 32 * 48 + 40 * 48 + 6 * 3 * 16 + 48 + 2, 4 * (3 + 48 + 40 + 6)
    assert (found.quantized_bytes, found.float_bytes) == (integer + scale, 4 * (48 + 40))
    found = lint(blocked(random))
    assert (found.quantized_bytes, found.float_bytes) == (
        64 * 48 // 2 + 4 * 48 // 2 + 48 * 32 + 4 * (4 * 48 + 3 * 32),
        0,
    )


# --- edits


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def output(model: ir.Model, name: str) -> ir.Value:
    return node_of(model, name).outputs[0]


def store(name: str, make: Callable[[np.random.Generator], NDArray[Any]]) -> Edit:
    """Another tensor under an initializer's name."""
    return lambda model, random: put(
        model, model.graph.initializers[name], ir.tensor(np.asarray(make(random)), name=name)
    )


def assign(name: str, index: int | tuple[int, ...], value: float) -> Edit:
    """One element of an initializer."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        held = model.graph.initializers[name]
        assert held.const_value is not None
        array = held.const_value.numpy().copy()
        array[index] = value
        put(model, held, ir.tensor(array, name=name))

    return edit


def attribute(name: str, key: str, value: int) -> Edit:
    return lambda model, random: node_of(model, name).attributes.add(ir.AttrInt64(key, value))


def read(name: str, index: int, make: Callable[[np.random.Generator], NDArray[Any]]) -> Edit:
    """An input of a node becomes an initializer of its own."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        value = ir.Value(name="own")
        put(model, value, ir.tensor(make(random), name="own"))
        node = node_of(model, name)
        node.resize_inputs(max(index + 1, len(node.inputs)))
        node.replace_input_with(index, value)

    return edit


def rewire(name: str, index: int, source: str | None) -> Edit:
    """An input of a node comes from another node, or from nowhere."""

    def edit(model: ir.Model, random: np.random.Generator) -> None:
        node_of(model, name).replace_input_with(index, output(model, source) if source else None)
        drop_unread(model)

    return edit


def drop_unread(model: ir.Model) -> None:
    for node in reversed(list(model.graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            model.graph.remove(node, safe=True)


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


def only_problem(found: Lint) -> str:
    assert not found
    (line,) = found.problems
    print(line)
    assert "\n" not in line
    return line


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


# --- what was left in float


def floating(random: np.random.Generator, *views: str, size: int = 32, dtype: Any = np.float32) -> ir.Model:
    """A layer that reads its weight through views."""
    text = "net (float[rows, 32] x) => (float[rows, 32] y) {\n"
    source = "weight"
    for number, view in enumerate(views):
        text += f"v{number} = {view.format(source)}\n"
        source = f"v{number}"
    weights = {"weight": random.normal(size=(size, size)).astype(dtype)}
    return model_of(f"{text} y = MatMul (x, {source}) }}", weights)


@pytest.mark.parametrize(
    "views", [(), ("Cast <to: int = 1> ({})",), ("Cast <to: int = 1> ({})", "Transpose <perm: ints = [1, 0]> ({})")]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_weight_is_a_problem_unless_it_is_named(
    views: tuple[str, ...], dtype: Any, random: np.random.Generator
) -> None:
    model = floating(random, *views, dtype=dtype)
    line = only_problem(lint(model))
    assert line.startswith("MatMul of weight: found ")
    found = lint(model, floats={"weight"})
    assert found
    size = 1024 * np.dtype(dtype).itemsize
    assert found.left == (("weight", size, "MatMul"),)
    assert (found.quantized_bytes, found.float_bytes) == (0, size)


def test_small_float_weights_are_no_problem(random: np.random.Generator) -> None:
    found = lint(floating(random, size=31))
    assert found
    assert (found.left, found.float_bytes) == ((), 4 * 31 * 31)


def test_a_constant_that_meets_a_weight_is_data(random: np.random.Generator) -> None:
    model = w8a8(random)
    read("x_q", 0, lambda random: random.normal(size=(64, 32)).astype(np.float32))(model, random)
    found = lint(model)
    assert found
    assert found.float_bytes == 4 * (48 + 40 + 64 * 32)
    text = "net (float[rows, 32] x) => (float[64, 32] y) { y = MatMul (queries, weight) }"
    arrays = {
        name: random.normal(size=(size, 32)).astype(np.float32) for name, size in (("queries", 64), ("weight", 32))
    }
    assert [name for name, *_ in lint(model_of(text, arrays)).left] == ["weight"]


def test_weights_in_a_file_are_read_where_they_lie(tmp_path: Path, random: np.random.Generator) -> None:
    model = w8a8(random)
    assign("w", (0, 0), -128)(model, random)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    opened = ir.load(tmp_path / "model.onnx")
    assert isinstance(opened.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert lint(opened) == lint(model)
    assert "-128" in only_problem(lint(opened))


# --- the demo and versions


@pytest.mark.parametrize("path", DEMO, ids=lambda path: path.name)
def test_the_demo_s_graphs_have_no_problems_in_float(path: Path) -> None:
    model = ir.load(path)
    found = lint(model)
    names = [name for name, *_ in found.left]
    print(f"{path.name}: {len(names)} float weights, {found.float_bytes} bytes")
    assert len(found.problems) == len(names) > 0
    assert lint(model, floats=names)
    assert found.float_bytes >= sum(size for _, size, _ in found.left)
    assert found.supports["10.16"] == found.supports["11.4"] == "as written"


def test_versions_say_what_they_need_lowered() -> None:
    decode, older, refine = (
        lint(ir.load(DEMO[0].parent / f"{stage}.onnx")).supports for stage in ("decode", "decode.opset23", "refine")
    )
    assert decode["10.3"] == "opset 24 > 20; Attention, RMSNormalization, RotaryEmbedding, TensorScatter"
    assert older["10.13"] == "opset 23 > 20; Attention, RMSNormalization, RotaryEmbedding"
    assert refine["10.3"] == "opset 24 > 20; Attention"


@pytest.mark.parametrize(
    ("build", "opset", "expected"),
    [
        (w8a8, 20, "as written"),
        (w8a8, 21, "opset 21 > 20"),
        (blocked, 21, "as written"),
        (blocked, 23, "opset 23 > 21"),
    ],
)
def test_blocks_bring_their_opset_with_them(
    build: Callable[[np.random.Generator], ir.Model], opset: int, expected: str, random: np.random.Generator
) -> None:
    model = build(random)
    model.graph.opset_imports[""] = opset
    assert lint(model).supports["10.3"] == expected
    assert lint(model).supports["10.16"] == "as written"


def test_an_operator_alone_may_need_lowering(random: np.random.Generator) -> None:
    text = "net (float[rows, 32] x) => (float[rows, 32] y) { y = RMSNormalization (x, weight) }"
    model = model_of(text, {"weight": scales(random, 32)}, opset=20)
    assert lint(model).supports == {
        "10.3": "RMSNormalization",
        "10.13": "RMSNormalization",
        "10.16": "as written",
        "11.4": "as written",
    }
