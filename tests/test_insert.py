"""Quantised layers compute what NumPy says, are those of ONNX Runtime's own quantiser, and are fused by its engine."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from calibration.blocks import Blocks, round_to_nearest
from calibration.insert import Factors, columns_quantized, insert_int4, insert_int8, scaled_weight
from calibration.linears import Linear, fold_constant_products, linears_of
from calibration.lint import lint
from runtime.backend_ort import CAST_LIMIT, EXACT_INT8
from tests.graphs import Arrays, run
from tests.text_graphs import STORED, assert_same_bits, normal, outputs, typed

HEADS = """
net (float[1, rows, 32] x) => (float[1, rows, 48] q, float[1, rows, 20] k, float[1, rows, 20] v) {
    a = MatMul (x, w_q)
    q = Add (a, bias)
    k = MatMul (x, w_k)
    h = Tanh (k)
    v = MatMul (h, w_v)
}
"""
SHAPES = {"w_q": (32, 48), "w_k": (32, 20), "w_v": (20, 20)}
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def heads(random: np.random.Generator) -> ir.Model:
    """Three layers, two of which share an activation."""
    weights = {name: normal(random, *shape) for name, shape in SHAPES.items()}
    return typed(HEADS, {**weights, "bias": normal(random, 48)})


def quantize(model: ir.Model, scales: dict[str, float], dtype: ir.DataType = FLOAT, **factors: Factors) -> ir.Model:
    """All layers in 8 bits."""
    insert_int8(model, linears_of(model), scales, factors, dtype)
    return model


def engine(model: ir.Model | Path, folder: Path | None = None, *, optimize: bool = True) -> ort.InferenceSession:
    """A session as the runtime opens it, which leaves its optimised graph in ``folder``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for entry in (CAST_LIMIT, EXACT_INT8):
        options.add_session_config_entry(*entry)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def fused(model: ir.Model | Path, folder: Path) -> collections.Counter[str]:
    """Operators of the graph that ONNX Runtime makes of a graph."""
    engine(model, folder)
    found = onnx.load(folder / "optimized.onnx", load_external_data=False)
    return collections.Counter(node.op_type for node in found.graph.node)


def round_trip(rows: NDArray[Any], scale: float) -> NDArray[np.float32]:
    """QuantizeLinear and DequantizeLinear of int8 as ONNX defines them: halves to even, saturating."""
    scale = np.float32(scale)
    return (np.rint(rows / scale).clip(-128, 127) * scale).astype(np.float32)


def columns_round_trip(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    scales = np.abs(weight).max(0) / np.float32(127)
    return (np.rint(weight / scales).clip(-127, 127) * scales).astype(np.float32)


def even(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight with columns whose scales are powers of two, so that sums are exact in whatever order."""
    weight = weight.copy()
    weight[0] = 127 * 2.0 ** np.ceil(np.log2(np.abs(weight).max(0) / 127))
    return weight


def assert_near(found: Arrays, expected: Arrays, limit: float) -> None:
    for name, wanted in expected.items():
        difference = float(np.abs(found[name] - wanted).max() / np.abs(wanted).max())
        print(f"{name}: largest difference {difference:.2g} of the largest output")
        assert difference < limit, name


# --- 8 bits: what is computed


@pytest.mark.parametrize("optimize", [True, False])
def test_a_quantised_layer_computes_to_the_bit_what_numpy_says(optimize: bool, random: np.random.Generator) -> None:
    weight, x = even(normal(random, 32, 24)), normal(random, 7, 32)
    x[0, :4] = 0.5 / 32, 1.5 / 32, -2.5 / 32, 100  # ties and what is clipped
    text = "net (float[rows, 32] x) => (float[rows, 24] y) { y = MatMul (x, weight) }"
    model = quantize(typed(text, {"weight": weight}), {"x": 1 / 32})
    found = run(engine(model, optimize=optimize), x=x)["y"]
    np.testing.assert_array_equal(found, round_trip(x, 1 / 32) @ columns_round_trip(weight))


def test_layers_one_after_the_other_with_biases_compute_what_numpy_says(random: np.random.Generator) -> None:
    model, x = heads(random), normal(random, 1, 7, 32)
    weights = {name: layer.weight() for name, layer in linears_of(model).items()}
    bias = model.graph.initializers["bias"].const_value
    assert bias is not None
    scales = {"x": 3 / 127, "h": 1 / 127}
    rows = round_trip(x, scales["x"])
    wide = {name: columns_round_trip(weight) for name, weight in weights.items()}
    k = rows @ wide["w_k"]
    expected = {"q": rows @ wide["w_q"] + bias.numpy(), "k": k, "v": round_trip(np.tanh(k), scales["h"]) @ wide["w_v"]}
    found = outputs(quantize(model, scales), x=x)
    assert_near({name: found[name] for name in "qk"}, {name: expected[name] for name in "qk"}, 1e-6)
    assert_near(found, expected, 0.03)  # a value close to a tie may round the other way


def test_the_graph_is_that_of_onnx_runtimes_quantiser(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = heads(random), normal(random, 1, 7, 32)
    limits = {"x": np.float32(2.7), "h": np.float32(0.93)}
    theirs = ir.from_proto(toolkit_quantized(ir.to_proto(model), limits, monkeypatch))
    ours = quantize(model, {name: float(limit) / 127 for name, limit in limits.items()})
    for name in ("a", "k", "v"):
        mine, other = parts(ours, name), parts(theirs, name)
        assert mine.keys() == other.keys()
        for part, array in mine.items():
            assert array.dtype == other[part].dtype, (name, part)
            np.testing.assert_array_equal(array, other[part], f"{name}: {part}")
    assert_same_bits(run(engine(ours, optimize=False), x=x), run(engine(theirs, optimize=False), x=x))


def toolkit_quantized(
    model: onnx.ModelProto, limits: dict[str, np.float32], monkeypatch: pytest.MonkeyPatch
) -> onnx.ModelProto:
    """The model quantised by ``onnxruntime.quantization``, which sets up logging when it is imported."""
    monkeypatch.setattr(logging.root, "handlers", [*logging.root.handlers])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    every = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    ranges = {name: (np.float32(-1), np.float32(1)) for name in every}  # asked for, and not used
    ranges |= {name: (-limit, limit / 2) for name, limit in limits.items()}
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "MatMulConstBOnly": True,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )
    quantizer.quantize_model()
    found: onnx.ModelProto = quantizer.model.model
    return found


def parts(model: ir.Model, output: str) -> dict[str, NDArray[Any]]:
    """Constants of the quantised layer that makes ``output``."""
    layer = next(node for node in model.graph if node.outputs[0].name == output)
    up, weight = (value.producer() for value in layer.inputs if value is not None)
    assert up is not None and weight is not None and layer.op_type == "MatMul"
    down = up.inputs[0].producer() if up.inputs[0] is not None else None
    assert down is not None and down.op_type == "QuantizeLinear"
    assert up.op_type == weight.op_type == "DequantizeLinear" and weight.attributes.get_int("axis", 1) == 1
    places = {"Q": down.inputs[1:], "DQ": up.inputs[1:], "weight": weight.inputs}
    found = {f"{place} {at}": value for place, values in places.items() for at, value in enumerate(values)}
    return {name: value.const_value.numpy() for name, value in found.items() if value is not None and value.const_value}


@pytest.mark.parametrize("stored", STORED)
def test_a_weight_in_16_bits_is_quantised_as_the_numbers_it_holds(stored: str, random: np.random.Generator) -> None:
    text = """
    net (float[rows, 32] x) => (float[rows, 24] y) {
        wide = Cast <to: int = 1> (weight)
        y = MatMul (x, wide)
    }
    """
    weight, x = normal(random, 32, 24).astype(STORED[stored]), normal(random, 7, 32)
    model = quantize(typed(text, {"weight": weight}), {"x": 0.03})
    assert "weight" not in model.graph.initializers and "Cast" not in {node.op_type for node in model.graph}
    plain = "net (float[rows, 32] x) => (float[rows, 24] y) { y = MatMul (x, weight) }"
    wide = quantize(typed(plain, {"weight": weight.astype(np.float32)}), {"x": 0.03})
    assert_same_bits(outputs(model, x=x), outputs(wide, x=x))


def test_rows_and_columns_are_scaled_before_they_are_rounded(random: np.random.Generator) -> None:
    weight, x = normal(random, 32, 24), normal(random, 7, 32)
    rows, columns = (random.integers(-3, 4, size, dtype=np.int8) for size in (32, 24))
    factors = Factors(rows, columns)
    scaled = scaled_weight(weight, factors)
    np.testing.assert_array_equal(scaled, 2.0 ** rows[:, None] * weight * 2.0**columns)
    text = "net (float[rows, 32] x) => (float[rows, 24] y) { y = MatMul (x, weight) }"
    found = outputs(quantize(typed(text, {"weight": weight}), {"x": 0.03}, weight=factors), x=x)
    assert_same_bits(found, outputs(quantize(typed(text, {"weight": scaled}), {"x": 0.03}), x=x))


def test_a_weight_of_several_layers_is_stored_for_each_as_it_needs_it(random: np.random.Generator) -> None:
    text = """
    net (float[rows, 32] x) => (float[rows, 32] y) {
        a = MatMul (x, weight)
        b = Tanh (a)
        y = MatMul (b, weight)
    }
    """
    weight, x = normal(random, 32, 32), normal(random, 7, 32)
    factors = Factors(columns=random.integers(-3, 4, 32, dtype=np.int8))
    model = quantize(typed(text, {"weight": weight}), {"x": 0.03, "b": 1 / 127}, **{"weight#2": factors})
    inner = np.tanh(round_trip(x, 0.03) @ columns_round_trip(weight))
    expected = round_trip(inner, 1 / 127) @ columns_round_trip(scaled_weight(weight, factors))
    assert_near(outputs(model, x=x), {"y": expected}, 0.03)


def test_names_that_are_taken_are_left_to_who_has_them(random: np.random.Generator) -> None:
    text = """
    net (float[rows, 32] x) => (float[rows, 24] y) {
        a = Mul (x, x.scale)
        h = Mul (a, w.int8)
        y = MatMul (x, w)
    }
    """
    taken = {name: normal(random, 32) for name in ("x.scale", "w.int8")}
    dotted = text.replace("x.scale", "x_scale").replace("w.int8", "w_int8")
    model = typed(dotted, {"x_scale": taken["x.scale"], "w_int8": taken["w.int8"], "w": normal(random, 32, 24)})
    for name in taken:
        model.graph.initializers[name.replace(".", "_")].name = name
    x = normal(random, 7, 32)
    weight = linears_of(model)["w"].weight()
    found = outputs(quantize(model, {"x": 0.03}), x=x)
    assert_near(found, {"y": round_trip(x, 0.03) @ columns_round_trip(weight)}, 1e-6)


# --- 8 bits: numbers at the edge


def test_every_column_has_a_127_and_a_column_of_zeros_the_scale_1(random: np.random.Generator) -> None:
    weight = normal(random, 64, 24) * random.lognormal(0, 4, 24).astype(np.float32)
    weight[:, 3] = 0
    values, scales = columns_quantized(weight)
    assert values.dtype == np.int8 and scales.dtype == np.float32
    assert (np.abs(np.delete(values, 3, 1)).max(0) == 127).all() and values.min() >= -127
    assert scales[3] == 1 and not values[:, 3].any()
    assert (np.abs(values * scales - weight) <= scales * 0.5001).all()


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_scales_are_normal_numbers_that_their_dtype_holds(dtype: ir.DataType, random: np.random.Generator) -> None:
    """In float16 numbers below 6e-5 are subnormal, which is where scales of small weights are."""
    smallest = np.finfo(dtype.numpy()).tiny
    weight = normal(random, 64, 24) * smallest * np.logspace(-3, 5, 24, dtype=np.float32)
    values, scales = columns_quantized(weight, dtype)
    assert (scales >= smallest).all() and (scales[-1] > smallest) and scales.dtype == np.float32
    np.testing.assert_array_equal(scales.astype(dtype.numpy()).astype(np.float32), scales)
    assert (np.abs(values * scales - weight) <= scales * 0.5001 + np.abs(weight) * 1e-3).all()


def half_model(random: np.random.Generator, size: float = 1) -> ir.Model:
    text = "net (float16[rows, 32] x) => (float16[rows, 24] y) { h = MatMul (x, weight)\n y = Add (h, bias) }"
    weights = {"weight": normal(random, 32, 24) * np.float32(size), "bias": normal(random, 24) * np.float32(size)}
    return typed(text, {name: array.astype(np.float16) for name, array in weights.items()})


@pytest.mark.parametrize("size", [1, 2.0**-9])
def test_a_graph_in_float16_stays_in_float16(size: float, random: np.random.Generator) -> None:
    """Weights a 500th as large have scales that float16 does not hold well; the largest error stays as it is."""
    model, x = half_model(random, size), normal(random, 7, 32).astype(np.float16)
    before = outputs(model, x=x)
    quantize(model, {"x": float(np.abs(x).max()) / 127}, HALF)
    kinds = {value.dtype for name, value in model.graph.initializers.items() if "zero" not in name}
    assert kinds == {HALF, ir.DataType.INT8}
    assert lint(model)
    found = outputs(model, x=x)
    assert found["y"].dtype == np.float16
    assert_near(found, before, 0.05)


def test_an_activation_too_small_for_float16_becomes_zero_and_not_a_number(random: np.random.Generator) -> None:
    model = quantize(half_model(random), {"x": 1e-9}, HALF)
    assert lint(model)
    assert np.isfinite(outputs(model, x=np.full((2, 32), 1e-7, np.float16))["y"]).all()


# --- 8 bits: what ONNX Runtime makes of it


def test_layers_that_share_an_activation_are_all_fused(random: np.random.Generator, tmp_path: Path) -> None:
    found = fused(quantize(heads(random), {"x": 0.03, "h": 0.01}), tmp_path)
    assert found["MatMulIntegerToFloat"] == 3 and not found["MatMul"] and not found["DequantizeLinear"]


@pytest.mark.parametrize(("rows", "bias"), [("5", (1, 24)), ("rows", (24,))])
def test_a_bias_gets_an_axis_where_none_of_the_activation_is_free(
    rows: str, bias: tuple[int, ...], random: np.random.Generator, tmp_path: Path
) -> None:
    """Without it ONNX Runtime 1.32 does not load the first; with it, it would not fuse the Gelu of the second."""
    text = f"""
    net (float[1, {rows}, 32] x) => (float[1, {rows}, 24] y) {{
        h = MatMul (x, weight)
        y = Add (bias, h)
    }}
    """
    weight, shift, x = normal(random, 32, 24), normal(random, 24), normal(random, 1, 5, 32)
    model = quantize(typed(text, {"weight": weight, "bias": shift}), {"x": 0.03})
    added = model.graph.node("y").inputs[0]
    assert added is not None and added.shape is not None and added.shape.numpy() == bias
    assert fused(model, tmp_path)["MatMulIntegerToFloat"] == 1
    assert_near(outputs(model, x=x), {"y": round_trip(x, 0.03) @ columns_round_trip(weight) + shift}, 1e-6)


def test_layers_may_share_a_bias(random: np.random.Generator) -> None:
    text = """
    net (float[5, 32] x) => (float[5, 24] y, float[5, 24] z) {
        a = MatMul (x, v)
        y = Add (a, bias)
        b = MatMul (x, w)
        z = Add (b, bias)
    }
    """
    weights = {"v": normal(random, 32, 24), "w": normal(random, 32, 24)}
    bias, x = normal(random, 24), normal(random, 5, 32)
    found = outputs(quantize(typed(text, {**weights, "bias": bias}), {"x": 0.03}), x=x)
    rows = round_trip(x, 0.03)
    expected = {name: rows @ columns_round_trip(weights[weight]) + bias for name, weight in (("y", "v"), ("z", "w"))}
    assert_near(found, expected, 1e-6)


# --- 4 bits


def blocked(model: ir.Model, block: int = 16, dtype: ir.DataType = FLOAT, bits: int = 4) -> dict[str, Blocks]:
    """All layers that the block divides in blocks of integers."""
    layers = {name: layer for name, layer in linears_of(model).items() if layer.shape[0] % block == 0}
    blocks = {name: round_to_nearest(layer.weight(), block, bits) for name, layer in layers.items()}
    insert_int4(model, layers, blocks, dtype)
    return blocks


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_are_written_as_they_are_and_fused(bits: int, random: np.random.Generator, tmp_path: Path) -> None:
    model, x = heads(random), normal(random, 1, 7, 32)
    weights = {name: layer.weight() for name, layer in linears_of(model).items()}
    blocks = blocked(model, bits=bits)
    assert blocks.keys() == {"w_q", "w_k"}  # the third has 20 rows
    stored = {name: model.graph.initializers[f"{name}.int{bits}"] for name in blocks}
    assert {value.dtype for value in stored.values()} == {ir.DataType.INT4 if bits == 4 else ir.DataType.INT8}
    assert not weights.keys() & blocks.keys() & set(model.graph.initializers)
    for name, value in stored.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy().astype(np.int8), blocks[name].values)
    found, plain = run(engine(model), x=x), run(engine(model, optimize=False), x=x)
    np.testing.assert_allclose(plain["k"], x @ blocks["w_k"].dense(), rtol=1e-5, atol=1e-5)
    assert_near(found, plain, 0.1)  # the fused operator rounds activations to 8 bits
    counts = fused(model, tmp_path)
    assert counts["MatMulNBits"] == 2 and counts["MatMul"] == 1


def test_blocks_in_float16_keep_weights_too_small_for_its_scales(random: np.random.Generator) -> None:
    model = half_model(random)
    (layer,) = linears_of(model).values()
    weight = layer.weight()
    weight[:16] *= 2e-4  # their scale would be below 6e-5
    blocks = round_to_nearest(weight, 16)
    insert_int4(model, {layer.name: Linear(layer.name, layer.node)}, {layer.name: blocks}, HALF)
    assert lint(model)
    values, scales = (model.graph.initializers[f"weight.{part}"].const_value for part in ("int4", "scale"))
    assert values is not None and scales is not None
    wide = np.repeat(scales.numpy().astype(np.float32), 16, axis=0)
    difference = np.abs(values.numpy().astype(np.float32) * wide - blocks.dense())
    assert (difference <= wide * 0.5001)[:16].all()
    assert (difference <= np.abs(weight) * 2e-3 + wide * 1e-2)[16:].all()
    assert np.isfinite(outputs(model, x=normal(random, 7, 32).astype(np.float16))["y"]).all()


def test_folded_products_can_be_quantised(random: np.random.Generator) -> None:
    text = "net (float[rows, 32] x) => (float[rows, 20] y) { w = MatMul (a, b)\n y = MatMul (x, w) }"
    a, b, x = normal(random, 32, 16), normal(random, 16, 20), normal(random, 7, 32)
    model = typed(text, {"a": a, "b": b})
    fold_constant_products(model)
    found = outputs(quantize(model, {"x": 0.03}), x=x)
    assert_near(found, {"y": round_trip(x, 0.03) @ columns_round_trip(a @ b)}, 1e-3)
