"""Every edit of a graph keeps its results, to the bit, and ensures what it says."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calibration.passes import narrow_weights
from export.passes import attach_gather_pool, fold_constants, transpose_weights
from kernels.spec import gather_pool

OPSETS = [helper.make_opsetid("", 24), helper.make_opsetid("linvt", 1)]


def values(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, object], weights: dict[str, NDArray[np.generic]]
) -> ir.Model:
    """A graph whose last node's output is called y."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=OPSETS, ir_version=11))


def result(model: ir.Model, **feeds: NDArray[np.generic]) -> NDArray[np.float32]:
    data = ir.to_proto(model).SerializeToString()
    (found,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)
    return np.asarray(found)


def linear(weight: NDArray[np.generic]) -> ir.Model:
    nodes = [
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    return model_of(nodes, {"x": ["rows", weight.shape[1]]}, {"weight": weight})


# --- transpose_weights


def test_a_linear_layer_becomes_one_matmul_with_the_weight_s_name() -> None:
    model, x = linear(values(40, 32)), values(3, 32)
    before = result(model, x=x)
    transpose_weights(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert {name: value.shape.numpy() for name, value in model.graph.initializers.items() if value.shape} == {
        "weight": (32, 40)
    }
    np.testing.assert_array_equal(result(model, x=x), before)


def test_a_weight_used_both_ways_keeps_both_forms() -> None:
    nodes = [
        helper.make_node("Transpose", ["weight"], ["turned"], perm=[1, 0]),
        helper.make_node("Transpose", ["weight"], ["again"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "weight"], ["a"]),
        helper.make_node("MatMul", ["x", "turned"], ["b"]),
        helper.make_node("MatMul", ["x", "again"], ["c"]),
        helper.make_node("Sum", ["a", "b", "c"], ["y"]),
    ]
    model, x = model_of(nodes, {"x": [2, 8]}, {"weight": values(8, 8)}), values(2, 8)
    before = result(model, x=x)
    transpose_weights(model)
    assert "Transpose" not in [node.op_type for node in model.graph]
    assert sorted(model.graph.initializers) == ["weight", "weight.transposed_1_0"]
    np.testing.assert_array_equal(result(model, x=x), before)


def test_two_orders_of_one_weight_are_two_weights() -> None:
    nodes = [
        helper.make_node("Transpose", ["weight"], ["a"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["weight"], ["b"], perm=[2, 1, 0]),
        helper.make_node("Sum", ["a", "b", "weight", "x"], ["y"]),
    ]
    model, x = model_of(nodes, {"x": [4, 4, 4]}, {"weight": values(4, 4, 4)}), values(4, 4, 4, seed=1)
    before = result(model, x=x)
    transpose_weights(model)
    np.testing.assert_array_equal(result(model, x=x), before)


def test_a_transpose_of_an_activation_stays() -> None:
    model = model_of([helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])], {"x": [2, 3]}, {})
    transpose_weights(model)
    assert [node.op_type for node in model.graph] == ["Transpose"]


# --- narrow_weights


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [(ir.DataType.BFLOAT16, ml_dtypes.bfloat16), (ir.DataType.FLOAT16, np.float16)],
)
def test_weights_that_came_from_16_bits_are_stored_in_16_bits_without_a_change(
    dtype: ir.DataType, numpy_dtype: type[np.generic]
) -> None:
    weight, x = values(40, 32).astype(numpy_dtype).astype(np.float32), values(3, 32)
    model = linear(weight)
    before = result(model, x=x)
    transpose_weights(model)
    assert narrow_weights(model, dtype)
    stored = model.graph.initializers["weight"]
    assert stored.dtype == dtype and stored.const_value and stored.const_value.nbytes == 2 * weight.size
    np.testing.assert_array_equal(result(model, x=x), before)


@pytest.mark.parametrize("dtype", [ir.DataType.BFLOAT16, ir.DataType.FLOAT16])
def test_one_value_that_16_bits_do_not_hold_keeps_a_weight_wide(dtype: ir.DataType) -> None:
    weight = np.ones((40, 32), np.float32)
    for odd in (1 + 2**-20, 1e-30 * 1.2345, 3.3e38):
        weight[7, 7] = odd
        model = linear(weight)
        assert not narrow_weights(model, dtype)
        assert model.graph.initializers["weight"].dtype == ir.DataType.FLOAT


def test_small_weights_and_integers_stay() -> None:
    nodes = [
        helper.make_node("Gather", ["x", "rows"], ["taken"]),
        helper.make_node("Mul", ["taken", "scale"], ["y"]),
    ]
    weights = {"rows": np.zeros(2000, np.int64), "scale": np.ones(4, np.float32)}
    model = model_of(nodes, {"x": [3, 4]}, weights)
    assert not narrow_weights(model, ir.DataType.FLOAT16)


# --- fold_constants


def test_arithmetic_of_constants_goes_and_weights_stay() -> None:
    nodes = [
        helper.make_node("Add", ["one", "one"], ["two"]),
        helper.make_node("Mul", ["weight", "weight"], ["dead"]),
        helper.make_node("MatMul", ["x", "weight"], ["wide"]),
        helper.make_node("Mul", ["wide", "two"], ["y"]),
    ]
    weights = {"one": np.ones(1, np.float32), "weight": values(64, 64)}
    model, x = model_of(nodes, {"x": [2, 64]}, weights), values(2, 64)
    before = result(model, x=x)
    fold_constants(model)
    assert [node.op_type for node in model.graph if node.op_type != "Constant"] == ["MatMul", "Mul"]
    assert "weight" in model.graph.initializers
    np.testing.assert_array_equal(result(model, x=x), before)


# --- attach_gather_pool


@pytest.mark.parametrize(("top_k", "scales"), [(26, [1, 2, 4]), (3, [1, 2, 4]), (1, [1, 2, 4]), (5, [2]), (4, [4, 1])])
def test_the_node_s_function_is_the_oracle_s_arithmetic(top_k: int, scales: list[int]) -> None:
    node = helper.make_node("GatherPool", ["x", "rows"], ["y"], domain="linvt", scales=scales)
    rows = np.random.default_rng(top_k).permutation(30)[None, :top_k]
    model, x = model_of([node], {"x": [1, 30, 8]}, {"rows": rows}), values(1, 30, 8)
    attach_gather_pool(model)
    assert list(model.functions) == [("linvt", "GatherPool", "")]
    np.testing.assert_allclose(result(model, x=x), gather_pool(x, rows, scales), atol=1e-6)


def test_a_graph_without_the_node_is_left_alone() -> None:
    model = linear(values(40, 32))
    attach_gather_pool(model)
    assert not model.functions
