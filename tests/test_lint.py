"""Good QDQ graphs pass; what was left in float is listed, and the TensorRT releases that take a graph as written."""

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

from calibration.lint import lint
from tests.qdq_graphs import assign, blocked, only_problem, read, scales, w8a8
from tests.text_graphs import model_of

DEMO = sorted((Path(__file__).parent.parent / "runtime" / "demo" / "float").glob("*.onnx"))


# --- good graphs


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


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_constant_that_is_not_finite_is_a_problem(
    value: float, dtype: Any, random: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a weight in a file, in whichever piece of it."""
    monkeypatch.setattr("calibration.lint.PIECE", 100)
    model = floating(random, *(() if dtype is np.float32 else ("Cast <to: int = 1> ({})",)), dtype=dtype)
    assign("weight", tuple(random.integers(0, 32, 2).tolist()), value)(model, random)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    line = only_problem(lint(ir.load(tmp_path / "model.onnx"), floats=["weight"]))
    assert line == "constant weight: found values that are not finite, expected finite numbers"
    assert lint(ir.load(tmp_path / "model.onnx"), floats=["weight"], infinite=["weight"])


@pytest.mark.parametrize(
    "attribute",
    [
        ir.AttrTensor("value", ir.tensor(np.array([1, np.inf], np.float32))),
        ir.AttrFloat32("value_float", -np.inf),
        ir.AttrFloat32s("value_floats", [1, np.nan]),
    ],
    ids=lambda attribute: attribute.name,
)
def test_a_constant_node_that_is_not_finite_is_a_problem(attribute: ir.Attr) -> None:
    model = model_of("net (float[2] x) => (float[2] y) { c = Constant <value_float = 3.5> () y = Add (x, c) }", {})
    assert lint(model)
    attributes = model.graph[0].attributes
    attributes.clear()
    attributes.add(attribute)
    assert only_problem(lint(model)) == "constant c: found values that are not finite, expected finite numbers"
    assert lint(model, infinite=["c"])


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
