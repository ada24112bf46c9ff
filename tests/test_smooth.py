"""Smoothing factors go where they cost nothing, and in floating point they change no bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.insert import Factors, scaled_weight
from calibration.linears import Linear, linears_of, replace_constant
from calibration.smooth import MOST, Fold, fold_of, put_column_factors, put_factors, smooth_exponents
from tests.text_graphs import STORED, assert_same_bits, normal, outputs, typed

WIDTH = 32
NORMS = {
    "layer norm": "LayerNormalization (x, gain, shift)",
    "layer norm without a bias": "LayerNormalization (x, gain)",
    "rms norm": "RMSNormalization (x, gain)",
}


def norm_model(random: np.random.Generator, norm: str = NORMS["layer norm"], gain: Any = np.float32) -> ir.Model:
    """A norm that two layers read, its constants stored as ``gain``."""
    text = f"""
    net (float[rows, {WIDTH}] x, float[{WIDTH}] free) => (float[rows, {WIDTH}] y, float[rows, 16] z) {{
        gain = Cast <to: int = 1> (gain_stored)
        shift = Cast <to: int = 1> (shift_stored)
        h = {norm}
        y = MatMul (h, v)
        z = MatMul (h, w)
    }}
    """
    weights = {"v": normal(random, WIDTH, WIDTH), "w": normal(random, WIDTH, 16)}
    stored = {name: normal(random, WIDTH).astype(gain) for name in ("gain_stored", "shift_stored")}
    return typed(text, weights | stored)


def gated_model(random: np.random.Generator, lines: str = "p = Mul (g, u)", stored: Any = np.float32) -> ir.Model:
    """A gated feed-forward block: of its three weights ``up`` feeds the product."""
    text = f"""
    net (float[rows, {WIDTH}] x) => (float[rows, {WIDTH}] y) {{
        a = MatMul (x, gate)
        g = Sigmoid (a)
        up = Cast <to: int = 1> (up_stored)
        u = MatMul (x, up)
        {lines}
        y = MatMul (p, down)
    }}
    """
    shapes = {"gate": (WIDTH, 48), "up_stored": (WIDTH, 48), "down": (48, WIDTH)}
    weights: dict[str, NDArray[Any]] = {name: normal(random, *shape) for name, shape in shapes.items()}
    weights["up_stored"] = weights["up_stored"].astype(stored)
    return typed(text, weights)


def fold_at(model: ir.Model, activation: str) -> Fold | None:
    layers = linears_of(model)
    return fold_of(readers(layers, activation), layers)


def readers(layers: dict[str, Linear], activation: str) -> list[Linear]:
    return [layer for layer in layers.values() if layer.activation == activation]


def multiply_rows(model: ir.Model, layers: list[Linear], exponents: NDArray[np.int8]) -> None:
    """What quantising does to the weights of a smoothed activation, in floating point."""
    for layer in layers:
        replace_constant(model.graph, layer.node, 1, "rows", scaled_weight(layer.weight(), Factors(rows=exponents)))


def drawn(random: np.random.Generator, width: int, most: int = MOST) -> NDArray[np.int8]:
    return random.integers(-most, most, width, dtype=np.int8, endpoint=True)


# --- where factors go


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_norm_takes_the_factors_of_its_output(norm: str, random: np.random.Generator) -> None:
    model = norm_model(random, norm)
    assert fold_at(model, "h") == Fold(norm=model.graph.node("h"))


@pytest.mark.parametrize("product", ["p = Mul (g, u)", "p = Mul (u, g)"])
def test_a_layer_that_feeds_a_product_takes_the_factors_of_the_product(
    product: str, random: np.random.Generator
) -> None:
    assert fold_at(gated_model(random, product), "p") == Fold(feeder="up_stored")


@pytest.mark.parametrize(
    "lines",
    [
        "p = Add (g, u)",
        "p = Mul (g, g)",
        "p = Mul (u, u)",
        "p = linvt.Mul (g, u)",
        "s = Add (u, u)\n p = Mul (g, s)",
        "p = Mul (g, u)\n q = Tanh (u)",
        "p = Mul (g, u)\n q = Tanh (p)",
        "p = Mul (g, u)\n q = MatMul (gate, p)",
    ],
)
def test_other_sums_products_and_readers_are_refused(lines: str, random: np.random.Generator) -> None:
    typed_lines = lines.replace("linvt.", "")
    model = gated_model(random, typed_lines.replace("q = MatMul (gate, p)", "t = Transpose (p)\n q = MatMul (p, t)"))
    if lines != typed_lines:
        model.graph.node("p").domain = "linvt"
    assert fold_at(model, "p") is None


@pytest.mark.parametrize(
    "norm", ["LayerNormalization (x, free, shift)", "LayerNormalization (x, gain, free)", "Tanh (x)"]
)
def test_an_activation_that_no_constant_scales_is_refused(norm: str, random: np.random.Generator) -> None:
    assert fold_at(norm_model(random, norm), "h") is None


def test_a_norm_of_another_domain_and_an_input_of_the_graph_are_refused(random: np.random.Generator) -> None:
    model = norm_model(random)
    model.graph.node("h").domain = "com.microsoft"
    assert fold_at(model, "h") is None
    assert fold_at(gated_model(random), "x") is None


@pytest.mark.parametrize(
    ("model", "value", "activation"), [(norm_model, "h", "h"), (gated_model, "p", "p"), (gated_model, "u", "p")]
)
def test_what_the_graph_returns_is_not_scaled(
    model: Any, value: str, activation: str, random: np.random.Generator
) -> None:
    made = model(random)
    assert fold_at(made, activation) is not None
    made.graph.outputs.append(made.graph.node(value).outputs[0])
    assert fold_at(made, activation) is None


# --- how large they are


def test_factors_are_smoothquants_rounded_to_powers_of_two(random: np.random.Generator) -> None:
    """The slow twin: one channel after the other, in plain numbers."""
    channels = random.lognormal(0, 2, WIDTH).astype(np.float32)
    weights = [normal(random, WIDTH, 16) * random.lognormal(0, 1, (WIDTH, 1)).astype(np.float32) for _ in range(2)]
    for alpha in (0.25, 0.5, 0.75):
        factors = [
            float(channels[k]) ** alpha / max(float(np.abs(weight[k]).max()) for weight in weights) ** (1 - alpha)
            for k in range(WIDTH)
        ]
        expected = np.rint(np.log2(factors) - np.median(np.log2(factors)))
        assert np.abs(expected).max() < MOST
        np.testing.assert_array_equal(smooth_exponents(channels, weights, alpha), expected)


def test_dead_channels_and_weights_are_left_alone_and_factors_are_bounded(random: np.random.Generator) -> None:
    channels, weight = random.lognormal(0, 1, WIDTH).astype(np.float32), normal(random, WIDTH, 16)
    channels[3], weight[5] = 0, 0
    channels[7], channels[8] = 1e30, 1e-30
    exponents = smooth_exponents(channels, [weight], 0.5)
    assert exponents[3] == exponents[5] == 0
    assert (exponents[7], exponents[8]) == (MOST, -MOST)
    assert not smooth_exponents(np.zeros(WIDTH, np.float32), [weight], 0.5).any()


def test_an_outlier_is_divided_and_its_weights_multiplied(random: np.random.Generator) -> None:
    channels, weight = np.ones(WIDTH, np.float32), normal(random, WIDTH, 400).clip(-1, 1)
    channels[9] = 64
    exponents = smooth_exponents(channels, [weight], 0.5)
    assert exponents[9] == 3 and not np.delete(exponents, 9).any()


# --- folding changes no bit


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_factors_folded_into_a_norm_change_no_bit(norm: str, stored: str, random: np.random.Generator) -> None:
    model, x = norm_model(random, norm, STORED[stored]), normal(random, 5, WIDTH)
    feeds = {"x": x, "free": x[0]}
    before = outputs(model, **feeds)
    exponents = drawn(random, WIDTH)
    layers = readers(linears_of(model), "h")
    put_factors(model.graph, model.graph.node("h"), exponents)
    assert np.abs(outputs(model, **feeds)["y"] - before["y"]).max() > 0.1
    multiply_rows(model, layers, exponents)
    assert_same_bits(outputs(model, **feeds), before)


@pytest.mark.parametrize("stored", STORED)
def test_factors_folded_into_the_columns_of_a_feeder_change_no_bit(stored: str, random: np.random.Generator) -> None:
    """Also where float16 would hold the divided weights as subnormal numbers, or not at all."""
    model, x = gated_model(random, stored=STORED[stored]), normal(random, 5, WIDTH) / 64
    before = outputs(model, x=x)
    exponents = drawn(random, 48, most=20)
    layers = linears_of(model)
    put_column_factors(model.graph, layers["up_stored"], exponents)
    assert np.abs(outputs(model, x=x)["y"] - before["y"]).max() > 0.1
    multiply_rows(model, readers(layers, "p"), exponents)
    assert_same_bits(outputs(model, x=x), before)


def test_a_gain_that_two_norms_share_is_divided_for_one_and_then_for_the_other(random: np.random.Generator) -> None:
    text = f"""
    net (float[rows, {WIDTH}] x) => (float[rows, {WIDTH}] y) {{
        h = RMSNormalization (x, gain)
        a = MatMul (h, w)
        k = RMSNormalization (a, gain)
        y = MatMul (k, w)
    }}
    """
    model, x = typed(text, {"gain": normal(random, WIDTH), "w": normal(random, WIDTH, WIDTH)}), normal(random, 5, WIDTH)
    before = outputs(model, x=x)
    layers = linears_of(model)
    for activation in ("h", "k"):
        exponents = drawn(random, WIDTH)
        put_factors(model.graph, model.graph.node(activation), exponents)
        multiply_rows(model, readers(layers, activation), exponents)
        assert_same_bits(outputs(model, x=x), before)


def test_a_gain_in_16_bits_stays_in_16_bits(random: np.random.Generator) -> None:
    model = norm_model(random, gain=ml_dtypes.bfloat16)
    put_factors(model.graph, model.graph.node("h"), drawn(random, WIDTH))
    smoothed = [value for name, value in model.graph.initializers.items() if name.endswith(".smoothed")]
    assert [value.dtype for value in smoothed] == [ir.DataType.BFLOAT16] * 2
