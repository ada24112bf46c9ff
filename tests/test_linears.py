"""Which products count as layers, and that editing constants around them changes no result."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.linears import (
    constant_behind,
    fold_constant_products,
    grouped,
    linears_of,
    matrix,
    prune,
    replace_constant,
)
from tests.text_graphs import STORED, assert_same_bits, model_of, normal, outputs, typed


def behind_a_cast(weight: NDArray[Any], inputs: str = "x, wide") -> ir.Model:
    text = f"""
    net (float[rows, {len(weight)}] x) => (float[rows, {weight.shape[-1]}] y) {{
        wide = Cast <to: int = 1> (weight)
        y = MatMul ({inputs})
    }}
    """
    return typed(text, {"weight": weight})


# --- what counts


@pytest.mark.parametrize("stored", STORED)
def test_a_layer_has_the_name_shape_and_numbers_of_its_weight_however_it_is_stored(
    stored: str, random: np.random.Generator
) -> None:
    weight = normal(random, 24, 40).astype(STORED[stored])
    (layer,) = linears_of(behind_a_cast(weight)).values()
    assert (layer.name, layer.activation, layer.shape) == ("weight", "x", (24, 40))
    assert layer.weight().dtype == np.float32
    np.testing.assert_array_equal(layer.weight(), weight.astype(np.float32))


@pytest.mark.parametrize("name", ["weight", "odd#name"])
def test_a_weight_that_is_used_again_is_a_layer_of_its_own_every_time(name: str, random: np.random.Generator) -> None:
    text = """
    net (float[rows, 16] x) => (float[rows, 16] y) {
        a = MatMul (x, weight)
        b = MatMul (a, weight)
        y = MatMul (x, weight)
    }
    """
    model = typed(text, {"weight": normal(random, 16, 16)})
    model.graph.initializers["weight"].name = name
    layers = linears_of(model)
    assert list(layers) == [name, f"{name}#2", f"{name}#3"]
    groups = grouped(layers.values())
    assert {activation: [layer.name for layer in group] for activation, group in groups.items()} == {
        "x": [name, f"{name}#3"],
        "a": [f"{name}#2"],
    }


@pytest.mark.parametrize(
    "product",
    [
        "y = MatMul (x, x)",
        "y = MatMul (weight, x)",
        "y = MatMul (x, thin)",
        "y = MatMul (x, stack)",
        "y = Gemm (x, weight)",
        "row = Gather (x, first)\n y = MatMul (row, weight)",
        "z = MatMul (x, tall)\n y = MatMul (z, flat)",
        "q = Tanh (weight)\n y = MatMul (q, weight)",
        "turned = Transpose (weight)\n y = MatMul (x, turned)",
    ],
)
def test_other_products_are_no_layers(product: str, random: np.random.Generator) -> None:
    weights = {"weight": normal(random, 16, 16), "thin": normal(random, 16, 1), "stack": normal(random, 2, 16, 16)}
    weights["first"] = np.array(0)
    weights |= {"tall": normal(random, 16, 15), "flat": normal(random, 15, 16)}
    text = f"net (float[16, 16] x) => (float[16, 16] same) {{ {product}\n same = Identity (x) }}"
    assert not linears_of(typed(text, weights))


def test_a_product_in_a_domain_that_is_not_onnx_s_is_no_layer(random: np.random.Generator) -> None:
    text = "net (float[16, 16] x) => (float y) { y = linvt.MatMul (x, weight) }"
    assert not linears_of(model_of(text, {"weight": normal(random, 16, 16)}))


def test_a_weight_that_callers_may_replace_is_no_constant(random: np.random.Generator) -> None:
    text = "net (float[rows, 16] x, float[16, 16] weight) => (float y) { y = MatMul (x, weight) }"
    model = model_of(text, {"weight": normal(random, 16, 16)})
    assert constant_behind(model.graph[0].inputs[1]) is None
    assert not linears_of(model)


# --- constant products


@pytest.mark.parametrize("stored", STORED)
def test_a_product_of_constants_is_computed_once(stored: str, random: np.random.Generator) -> None:
    text = """
    net (float[rows, 16] x) => (float[rows, 20] y) {
        wide = Cast <to: int = 1> (queries)
        keys = MatMul (wide, weight)
        y = MatMul (x, keys)
    }
    """
    queries, weight, x = normal(random, 16, 24).astype(STORED[stored]), normal(random, 24, 20), normal(random, 3, 16)
    model = typed(text, {"queries": queries, "weight": weight})
    before = outputs(model, x=x)["y"]
    fold_constant_products(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert list(model.graph.initializers) == ["keys.folded"] and list(linears_of(model)) == ["keys.folded"]
    np.testing.assert_array_equal(
        matrix(model.graph[0].inputs[1]), (queries.astype(np.float64) @ weight.astype(np.float64)).astype(np.float32)
    )
    np.testing.assert_allclose(outputs(model, x=x)["y"], before, atol=1e-4, rtol=1e-4)


def test_a_chain_of_constant_products_folds_to_its_end(random: np.random.Generator) -> None:
    text = """
    net (float[rows, 16] x) => (float[rows, 16] y) {
        ab = MatMul (a, b)
        abc = MatMul (ab, c)
        y = Add (x, abc)
    }
    """
    weights = {name: normal(random, 1 if name == "a" else 16, 16) for name in "abc"}
    model = typed(text, weights)
    fold_constant_products(model)
    assert [node.op_type for node in model.graph] == ["Add"] and list(model.graph.initializers) == ["abc.folded"]
    expected = weights["a"].astype(np.float64) @ weights["b"] @ weights["c"]
    np.testing.assert_allclose(matrix(model.graph[0].inputs[1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int64", "float"])
def test_products_of_integers_and_those_that_the_graph_returns_stay(kind: str, random: np.random.Generator) -> None:
    product = "p = MatMul (a, b)\n y = Abs (p)" if kind == "int64" else "y = MatMul (a, b)"
    text = f"net (float[1] x) => ({kind}[2, 2] y, float[1] z) {{ {product}\n z = Identity (x) }}"
    numbers: Any = random.integers(2**53, 2**62, (2, 2, 2)) if kind == "int64" else normal(random, 2, 2, 2)
    model = typed(text, {"a": numbers[0], "b": numbers[1]})
    x = normal(random, 1)
    before = outputs(model, x=x)
    fold_constant_products(model)
    assert next(node.op_type for node in model.graph) == "MatMul"
    assert_same_bits(outputs(model, x=x), before)


# --- replacing constants


@pytest.mark.parametrize("stored", STORED)
def test_a_replaced_constant_is_stored_as_the_one_before(stored: str, random: np.random.Generator) -> None:
    weight, x = normal(random, 16, 24).astype(STORED[stored]), normal(random, 3, 16)
    model = behind_a_cast(weight)
    node = model.graph.node("y")
    replace_constant(model.graph, node, 1, "doubled", 2 * weight.astype(np.float32))
    prune(model)
    assert {name: value.dtype.numpy() for name, value in model.graph.initializers.items() if value.dtype} == {
        "doubled": STORED[stored]
    }
    assert_same_bits(outputs(model, x=x / 2), outputs(behind_a_cast(weight), x=x))


def test_a_replaced_constant_is_stored_wider_where_16_bits_would_lose_any(random: np.random.Generator) -> None:
    weight = normal(random, 16, 24).astype(np.float16)
    model = behind_a_cast(weight)
    node = model.graph.node("y")
    values = np.ldexp(weight.astype(np.float32), -20)
    replace_constant(model.graph, node, 1, "small", values)
    prune(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]
    np.testing.assert_array_equal(matrix(node.inputs[1]), values)
    x = normal(random, 3, 16)
    assert_same_bits(outputs(model, x=np.ldexp(x, 20)), outputs(behind_a_cast(weight), x=x))


def test_other_readers_keep_the_constant_and_every_replacement_has_a_name(random: np.random.Generator) -> None:
    text = """
    net (float[rows, 16] x) => (float[rows, 16] a, float[rows, 16] b, float[rows, 16] c) {
        a = Add (x, bias)
        b = Add (x, bias)
        c = Add (x, bias)
    }
    """
    bias, x = normal(random, 16), normal(random, 3, 16)
    model = typed(text, {"bias": bias})
    for name, factor in (("a", 2), ("b", 3)):
        replace_constant(model.graph, model.graph.node(name), 1, "bias.changed", factor * bias)
    assert list(model.graph.initializers) == ["bias", "bias.changed", "bias.changed#2"]
    assert_same_bits(outputs(model, x=x), {"a": x + 2 * bias, "b": x + 3 * bias, "c": x + bias})


def test_pruning_leaves_what_is_read_or_returned(random: np.random.Generator) -> None:
    text = """
    net (float[rows, 16] x) => (float[rows, 16] y, bfloat16[16] kept) {
        half = Cast <to: int = 10> (unread)
        again = Cast <to: int = 1> (half)
        kept = Cast <to: int = 16> (returned)
        y = Add (x, read)
    }
    """
    model = typed(text, {name: normal(random, 16) for name in ("unread", "returned", "read")})
    prune(model)
    assert [node.name for node in model.graph] == ["kept", "y"]
    assert list(model.graph.initializers) == ["returned", "read"]
