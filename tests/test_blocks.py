"""Weights in blocks of small integers: what ONNX Runtime makes of them, and that every better method is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from calibration.awq import awq_scales
from calibration.blocks import Blocks, Floats, clipped, fitted_scales, output_error, round_to_nearest
from calibration.gptq import gptq
from runtime.errors import CalibrationError

K, N, ROWS, BLOCK = 96, 40, 64, 16


def random_weight(random: np.random.Generator, shape: tuple[int, int] = (K, N)) -> Floats:
    """Heavy-tailed weights f32."""
    return (random.standard_t(4, shape) * 0.02).astype(np.float32)


def random_rows(random: np.random.Generator, rows: int, channels: int = K) -> tuple[Floats, Floats]:
    """Correlated heavy-tailed activations (rows, K) f32 with three outlier channels, and as many held out."""
    mixing = random.standard_normal((channels, channels)) / (1 + np.arange(channels))[:, None]
    gains = random.lognormal(0, 0.5, channels)
    gains[random.choice(channels, 3, replace=False)] *= 40
    both = (random.standard_t(4, (2 * rows, channels)) @ mixing * gains).astype(np.float32)
    return both[:rows], both[rows:]


def weighted(weight: Floats, blocks: Blocks, importance: Floats) -> float:
    """The error that ``clipped`` minimises."""
    return float((importance[:, None] * np.square(weight - blocks.dense(), dtype=np.float64)).sum())


def onnxruntime_output(blocks: Blocks, rows: Floats) -> Floats:
    """``rows @ DequantizeLinear(values, scales)`` of a graph."""
    kind, shape = {4: TensorProto.INT4, 8: TensorProto.INT8}[blocks.bits], blocks.values.shape
    values = helper.make_tensor("values", kind, shape, blocks.values.ravel().tolist())
    scales = onnx.numpy_helper.from_array(blocks.scales, "scales")
    nodes = [
        helper.make_node("DequantizeLinear", ["values", "scales"], ["weight"], axis=0, block_size=blocks.block),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", shape[1]])
    graph = helper.make_graph(nodes, "layer", [x], [y], [values, scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else x becomes 8 bits as well
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": rows})[0])


def slow_gptq(weight: Floats, block: int, rows: Floats, bits: int, *, act_order: bool) -> Blocks:
    """Algorithm 1 as the paper writes it, without batches: the whole inverse and its Cholesky factor, all in f64."""
    limit, channels = 2 ** (bits - 1), len(weight)
    hessian = rows.T.astype(np.float64) @ rows
    importance = hessian.diagonal() / len(rows)
    order = np.argsort(-importance, kind="stable") if act_order else np.arange(channels)
    hessian = (hessian + 0.01 * hessian.diagonal().mean() * np.eye(channels))[np.ix_(order, order)]
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T  # upper
    current = weight[order].astype(np.float64)
    values = np.empty(weight.shape, np.int8)
    scales = clipped(weight, block, importance.astype(np.float32), bits).scales
    for at, channel in enumerate(order):
        group = channel // block
        if not act_order and channel % block == 0:
            here = slice(at, at + block)
            scales[group] = fitted_scales(current[None, here].astype(np.float32), importance[None, here], bits)[0]
        values[channel] = np.rint(current[at] / scales[group]).clip(-limit, limit - 1)
        error = (current[at] - values[channel] * scales[group].astype(np.float64)) / factor[at, at]
        current[at:] -= np.outer(factor[at, at:], error)
    return Blocks(values, scales, bits, block)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_computes_what_blocks_say(bits: int, random: np.random.Generator) -> None:
    rows, _ = random_rows(random, ROWS)
    blocks = gptq(random_weight(random), BLOCK, rows, bits)
    found, expected = onnxruntime_output(blocks, rows), rows @ blocks.dense()
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"{bits} bits: largest difference {difference:.2g} of the largest output")
    assert difference < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rounding", "clipped", "gptq", "gptq in order"])
def test_values_and_scales_have_the_types_and_ranges_of_the_format(
    method: str, bits: int, random: np.random.Generator
) -> None:
    blocks = quantised(method, random_weight(random), random_rows(random, ROWS)[0], bits)
    assert blocks.values.dtype == np.int8 and blocks.values.shape == (K, N)
    assert blocks.scales.dtype == np.float32 and blocks.scales.shape == (K // BLOCK, N)
    assert blocks.dense().dtype == np.float32
    assert -(2 ** (bits - 1)) <= blocks.values.min() and blocks.values.max() < 2 ** (bits - 1)
    assert (blocks.scales >= np.finfo(np.float32).tiny).all() and np.isfinite(blocks.scales).all()


def quantised(method: str, weight: Floats, rows: Floats, bits: int = 4, block: int = BLOCK) -> Blocks:
    if method == "rounding":
        return round_to_nearest(weight, block, bits)
    if method == "clipped":
        return clipped(weight, block, np.square(rows).mean(0), bits)
    return gptq(weight, block, rows, bits, act_order=method == "gptq")


@pytest.mark.parametrize("block", [16, 48, 96])
def test_each_better_method_loses_less_on_rows_it_never_saw(block: int, random: np.random.Generator) -> None:
    weight, (rows, held_out) = random_weight(random), random_rows(random, 4 * K)
    scales = awq_scales([weight], rows, block)
    errors = {
        method: output_error(weight, quantised(method, weight, rows, block=block).dense(), held_out)
        for method in ("rounding", "clipped", "gptq", "gptq in order")
    }
    scaled = round_to_nearest(weight * scales[:, None], block).dense() / scales[:, None]
    errors["awq"] = output_error(weight, scaled, held_out)
    print({method: f"{error:.2%}" for method, error in errors.items()})
    assert max(errors["clipped"], errors["awq"]) < 0.9 * errors["rounding"]
    assert errors["gptq in order"] < errors["clipped"]
    assert errors["gptq"] < 0.8 * errors["clipped"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [40, 400])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_fast_gptq_is_the_papers(act_order: bool, rows: int, bits: int, random: np.random.Generator) -> None:
    """With fewer rows than channels and more, over several batches of which the last is shorter."""
    channels = 320
    weight, (seen, _) = random_weight(random, (channels, N)), random_rows(random, rows, channels)
    found = gptq(weight, 32, seen, bits, act_order=act_order)
    expected = slow_gptq(weight, 32, seen, bits, act_order=act_order)
    same = float((found.values == expected.values).mean())
    errors = [output_error(weight, blocks.dense(), seen) for blocks in (found, expected)]
    print(f"{same:.3%} of the values are the same; errors {errors[0]:.5%} and {errors[1]:.5%}")
    assert same > 0.9  # a value close to a tie may round the other way, and the rest of its column follows
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_has_nothing_to_compensate_where_channels_are_independent(
    act_order: bool, random: np.random.Generator
) -> None:
    weight = random_weight(random)
    found = gptq(weight, BLOCK, 3 * np.eye(K, dtype=np.float32), act_order=act_order)
    expected = clipped(weight, BLOCK, np.ones(K, np.float32))
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.scales, expected.scales)


def test_clipping_is_never_worse_than_rounding_in_any_block(random: np.random.Generator) -> None:
    weight = random_weight(random)
    importance = random.lognormal(0, 2, K).astype(np.float32)
    rounded, better = round_to_nearest(weight, BLOCK), clipped(weight, BLOCK, importance)
    for start in range(0, K, BLOCK):
        here = slice(start, start + BLOCK)
        for column in range(N):
            block = weight[here, column : column + 1]
            errors = [
                weighted(block, cut(blocks, start // BLOCK, column), importance[here]) for blocks in (better, rounded)
            ]
            assert errors[0] <= errors[1] * (1 + 1e-5)


def cut(blocks: Blocks, group: int, column: int) -> Blocks:
    """A single block."""
    rows, columns = slice(group * blocks.block, (group + 1) * blocks.block), slice(column, column + 1)
    scales = blocks.scales[group : group + 1, columns]
    return dataclasses.replace(blocks, values=blocks.values[rows, columns], scales=scales)


def test_clipping_finds_nearly_the_best_of_all_scales(random: np.random.Generator) -> None:
    """Against four thousand scales for each block, all of its channels equally important."""
    blocks = random_weight(random, (BLOCK, 200))
    found = clipped(blocks, BLOCK, np.ones(BLOCK, np.float32))
    error = np.square(blocks - found.dense()).sum(0)  # (N,)
    least = np.full_like(error, np.inf)
    for ratio in np.linspace(0.3, 1.1, 4000, dtype=np.float32):
        scales = ratio * np.abs(blocks).max(0) / 7
        least = np.minimum(least, np.square(blocks - (blocks / scales).round().clip(-8, 7) * scales).sum(0))
    excess = float(error.sum() / least.sum()) - 1
    print(f"{excess:.3%} above the least error")
    assert excess < 0.03


def test_the_lowest_integer_is_used_where_it_helps(random: np.random.Generator) -> None:
    ladder = np.arange(-8, 8, dtype=np.float32)[:, None] * np.float32(0.125)
    blocks = clipped(ladder, BLOCK, np.ones(BLOCK, np.float32))
    np.testing.assert_array_equal(blocks.dense(), ladder)
    assert blocks.values.min() == -8
    assert np.abs(round_to_nearest(ladder, BLOCK).dense() - ladder).max() > 0.01


@pytest.mark.parametrize("method", ["rounding", "clipped", "gptq", "gptq in order"])
def test_blocks_of_zeros_have_scale_one(method: str, random: np.random.Generator) -> None:
    weight, (rows, _) = random_weight(random), random_rows(random, ROWS)
    rows[:, :BLOCK] = 0  # nothing is known of these channels, so nothing moves their weights
    weight[:BLOCK] = 0
    blocks = quantised(method, weight, rows)
    assert (blocks.scales[0] == 1).all() and not blocks.values[:BLOCK].any()
    assert blocks.values[BLOCK:].any(0).all()


@pytest.mark.parametrize("method", ["rounding", "clipped"])
@pytest.mark.parametrize("value", [0.3, -0.3, 1e-30, 1e30])
def test_constant_weights_are_kept(method: str, value: float, random: np.random.Generator) -> None:
    weight = np.full((K, N), value, np.float32)
    dense = quantised(method, weight, random_rows(random, ROWS)[0]).dense()
    np.testing.assert_allclose(dense, weight, rtol=1e-6)


@pytest.mark.parametrize("method", ["rounding", "clipped", "gptq", "gptq in order"])
def test_weights_below_the_smallest_normal_number_get_no_subnormal_scale(
    method: str, random: np.random.Generator
) -> None:
    weight = random_weight(random) * np.float32(1e-38)
    blocks = quantised(method, weight, random_rows(random, ROWS)[0])
    assert (blocks.scales >= np.finfo(np.float32).tiny).all()


def test_channels_that_saw_nothing_are_rounded_all_the_same(random: np.random.Generator) -> None:
    weight, rows = random_weight(random), np.zeros((ROWS, K), np.float32)
    for method in ("clipped", "gptq", "gptq in order"):
        blocks = quantised(method, weight, rows)
        assert output_error(weight, blocks.dense(), random_rows(random, ROWS)[1]) < 0.3
    np.testing.assert_array_equal(awq_scales([weight], rows, BLOCK), np.ones(K, np.float32))


@pytest.mark.parametrize("method", ["clipped", "gptq", "gptq in order"])
def test_the_same_input_gives_the_same_blocks_and_stays_as_it_was(method: str, random: np.random.Generator) -> None:
    weight, (rows, _) = random_weight(random), random_rows(random, ROWS)
    before = weight.copy(), rows.copy()
    first, second = quantised(method, weight, rows), quantised(method, weight, rows)
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.scales, second.scales)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(rows, before[1])


def test_pieces_of_a_large_weight_are_searched_as_one(random: np.random.Generator) -> None:
    weight = random_weight(random, (256, 5000))
    importance = random.lognormal(0, 1, 256).astype(np.float32)
    whole = clipped(weight, 64, importance)
    part = clipped(weight[64:128, 4000:4100], 64, importance[64:128])
    np.testing.assert_allclose(whole.scales[1, 4000:4100], part.scales[0], rtol=1e-6)


def test_awq_scales_enlarge_loud_channels_and_centre_on_one(random: np.random.Generator) -> None:
    weights = [random_weight(random), random_weight(random, (K, 8))]
    rows, _ = random_rows(random, ROWS)
    scales = awq_scales(weights, rows, BLOCK)
    assert scales.dtype == np.float32 and scales.shape == (K,)
    assert scales.max() * scales.min() == pytest.approx(1, rel=1e-5)
    np.testing.assert_array_equal(np.argsort(scales)[-3:], np.argsort(np.abs(rows).mean(0))[-3:])


def test_awq_leaves_channels_alone_that_are_all_as_loud(random: np.random.Generator) -> None:
    signs = random.choice([-1.0, 1.0], (ROWS, K)).astype(np.float32)
    np.testing.assert_array_equal(awq_scales([random_weight(random)], signs, BLOCK), np.ones(K, np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda weight, rows: (weight[:-1], rows[:, :-1]),
            "95 input channels, expected a multiple of the block size 16",
        ),
        (lambda weight, rows: (weight + np.float32(np.inf), rows), "NaN or infinite values, expected finite ones"),
        (lambda weight, rows: (weight, rows * np.float32(np.nan)), "saw NaN or infinite activations, expected finite"),
        (lambda weight, rows: (weight, rows[:0]), "saw no activations"),
    ],
    ids=["block", "weight", "rows", "no rows"],
)
def test_what_cannot_be_quantised_is_refused_in_one_line(
    damage: Callable[[Floats, Floats], tuple[Floats, Floats]], message: str, random: np.random.Generator
) -> None:
    weight, rows = damage(random_weight(random), random_rows(random, ROWS)[0])
    for quantise in (lambda: gptq(weight, BLOCK, rows), lambda: awq_scales([weight], rows, BLOCK)):
        with pytest.raises(CalibrationError, match=message):
            quantise()


def test_an_importance_that_is_no_number_is_refused(random: np.random.Generator) -> None:
    with pytest.raises(CalibrationError, match="expected finite numbers from 0"):
        clipped(random_weight(random), BLOCK, np.full(K, np.nan, np.float32))
