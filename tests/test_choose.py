"""Scales and narrow weights are those that err least: by ONNX Runtime's own errors, on rows that were not fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration import choose, choose_blocks
from calibration.blocks import output_error
from calibration.choose import CHOICES, chosen_scale
from calibration.choose_blocks import FITS, block_of, chosen_blocks
from calibration.insert import LEVELS, Factors, insert_int8
from calibration.linears import Linear, linears_of
from calibration.observe import Observer
from calibration.scales import TensorScale
from runtime.backend_ort import create_session
from runtime.errors import CalibrationError

Floats = NDArray[np.float32]

K, N = 64, 48
METHODS = CHOICES[1:]
LOUD = 5  # the channel that is loud in ``loud``


def even(random: np.random.Generator) -> Floats:
    return random.standard_normal((600, K)).astype(np.float32)


def loud(random: np.random.Generator) -> Floats:
    """One channel is a hundred times the others."""
    rows = even(random)
    rows[:, LOUD] *= 100
    return rows


def peaked(random: np.random.Generator) -> Floats:
    """Few values far above all others, in any channel."""
    return (random.standard_t(2, (600, K)) * random.lognormal(0, 1, K)).astype(np.float32)


ROWS = {"even": even, "loud": loud, "peaked": peaked}


def observed(rows: Floats) -> Observer:
    observer = Observer("x")
    observer.add(rows)
    return observer


def layers_of(*weights: Floats) -> tuple[ir.Model, list[Linear]]:
    """A graph of one activation x (rows, K) that every weight (K, N) is multiplied with."""
    results = ", ".join(f"float[rows, {weight.shape[1]}] y{i}" for i, weight in enumerate(weights))
    products = " ".join(f"y{i} = MatMul (x, w{i})" for i in range(len(weights)))
    header = '<ir_version: 10, opset_import: ["": 21]>'
    proto = onnx.parser.parse_model(f"{header} net (float[rows, {len(weights[0])}] x) => ({results}) {{{products}}}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights))
    model = ir.from_proto(proto)
    return model, list(linears_of(model).values())


def weights_of(random: np.random.Generator, *columns: int, rows: int = K) -> list[Floats]:
    return [(random.standard_t(4, (rows, count)) * 0.02).astype(np.float32) for count in columns]


def onnxruntime_error(weights: Sequence[Floats], rows: Floats, scale: TensorScale) -> float:
    """What the quantised layers do to ``rows`` (R, K), whose factors are folded into what makes them."""
    model, linears = layers_of(*weights)
    exponents = np.array(scale.smooth or [0] * len(weights[0]), np.int8)
    factors = {linear.name: Factors(rows=exponents) for linear in linears}
    layers = {linear.name: linear for linear in linears}
    insert_int8(model, layers, {"x": scale.threshold / LEVELS}, factors, ir.DataType.FLOAT)
    session = create_session(ir.to_proto(model).SerializeToString(), "cpu", 1)
    found = np.concatenate(session.run(None, {"x": np.ldexp(rows, -exponents.astype(np.int32))}), axis=1)
    wanted = rows @ np.concatenate(weights, axis=1)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# --- activations in 8 bits


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("method", CHOICES)
def test_the_error_that_is_told_is_the_one_onnxruntime_makes(
    method: choose.Choice, smooth: bool, kind: str, random: np.random.Generator
) -> None:
    weights, observer = weights_of(random, N, 32), observed(ROWS[kind](random))
    scale = chosen_scale(layers_of(*weights)[1], observer, method, smooth=smooth)
    found = max(onnxruntime_error(weights, rows, scale) for rows in (observer.sample, observer.loud))
    print(f"{scale.method}: told {scale.error:.5%}, found {found:.5%}")
    assert found == pytest.approx(scale.error, rel=1e-3)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("smooth", [False, True])
def test_auto_is_as_good_as_the_best_method(kind: str, smooth: bool, random: np.random.Generator) -> None:
    _, linears = layers_of(*weights_of(random, N, 32))
    observer = observed(ROWS[kind](random))
    scales = {method: chosen_scale(linears, observer, method, smooth=smooth) for method in CHOICES}
    print({method: f"{scale.error:.4%}" for method, scale in scales.items()})
    assert scales["auto"].error == min(scales[method].error for method in METHODS)
    assert scales["auto"].method in METHODS
    assert all(scales[method].method == method for method in METHODS)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("method", CHOICES)
def test_smoothing_never_makes_it_worse(method: choose.Choice, kind: str, random: np.random.Generator) -> None:
    _, linears = layers_of(*weights_of(random, N))
    observer = observed(ROWS[kind](random))
    plain, smooth = (chosen_scale(linears, observer, method, smooth=smooth) for smooth in (False, True))
    assert plain.smooth == ()
    assert smooth.error <= plain.error


def test_a_loud_channel_is_moved_into_the_weights(random: np.random.Generator) -> None:
    _, linears = layers_of(*weights_of(random, N))
    observer = observed(loud(random))
    plain, smooth = (chosen_scale(linears, observer, "auto", smooth=smooth) for smooth in (False, True))
    print(f"error {plain.error:.3%}, smoothed {smooth.error:.3%}, exponents {smooth.smooth}")
    assert len(smooth.smooth) == K and int(np.argmax(smooth.smooth)) == LOUD
    assert smooth.smooth[LOUD] >= 2
    assert smooth.error < plain.error / 2
    assert smooth.threshold < plain.threshold


def test_smoothing_is_left_out_where_it_does_not_help(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, linears = layers_of(*weights_of(random, N))
    harmful = np.tile(np.array([-6, 6], np.int8), K // 2)
    monkeypatch.setattr(choose, "smooth_exponents", lambda channels, weights, alpha: harmful)
    assert chosen_scale(linears, observed(even(random)), "auto", smooth=True).smooth == ()


def test_minmax_clips_nothing_that_was_seen_also_behind_smoothing(random: np.random.Generator) -> None:
    _, linears = layers_of(*weights_of(random, N))
    rows = loud(random)
    observer = observed(rows)
    for smooth in (False, True):
        scale = chosen_scale(linears, observer, "minmax", smooth=smooth)
        exponents = np.array(scale.smooth or [0] * K, np.int32)
        assert scale.threshold == np.abs(np.ldexp(rows, -exponents)).max()
        assert scale.largest == np.abs(rows).max()


def test_layers_that_share_an_activation_share_its_scale(random: np.random.Generator) -> None:
    weights = weights_of(random, N, 32, 16)
    _, linears = layers_of(*weights)
    observer = observed(peaked(random))
    together = chosen_scale(linears, observer, "auto", smooth=False)
    assert together.layers == ("w0", "w1", "w2")
    joined = chosen_scale(layers_of(np.concatenate(weights, axis=1))[1], observer, "auto", smooth=False)
    assert together.threshold == joined.threshold
    assert together.error == pytest.approx(joined.error, rel=1e-4)


def test_a_row_that_was_hardly_ever_there_counts(random: np.random.Generator) -> None:
    """Not one of the evenly drawn rows shows it, and every threshold but one clips it."""
    rows = random.standard_normal((100_000, K)).astype(np.float32)
    place = random.integers(len(rows))
    rows[place] *= 20
    observer = observed(rows)
    assert np.abs(observer.sample).max() < 10
    linears = layers_of(*weights_of(random, N))[1]
    scales = {method: chosen_scale(linears, observer, method, smooth=False) for method in ("auto", "percentile")}
    assert scales["auto"].threshold > 0.3 * np.abs(rows).max()
    assert scales["auto"].error < scales["percentile"].error / 2


@pytest.mark.parametrize("factor", [1e-27, 1e35])
def test_magnitudes_at_the_ends_of_float32_get_a_scale(factor: float, random: np.random.Generator) -> None:
    observer = observed(even(random) * np.float32(factor))
    scale = chosen_scale(layers_of(*weights_of(random, N))[1], observer, "auto", smooth=False)
    assert 1e-4 < scale.error < 0.05


def test_errors_are_measured_on_columns_from_all_over_a_wide_weight(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weight,) = weights_of(random, 1000)
    (linear,) = layers_of(weight)[1]
    monkeypatch.setattr(choose, "COLUMNS", 300)
    np.testing.assert_array_equal(choose.some_columns(linear), weight[:, ::4])
    monkeypatch.setattr(choose, "COLUMNS", 1000)
    np.testing.assert_array_equal(choose.some_columns(linear), weight)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(value: float, random: np.random.Generator) -> None:
    weights = weights_of(random, N)
    weights[0][3, 4] = value
    _, linears = layers_of(*weights)
    for chosen in (
        lambda: chosen_scale(linears, observed(even(random)), "auto", smooth=True),
        lambda: chosen_blocks(linears, observed(even(random)), 32, smooth=True),
    ):
        with pytest.raises(CalibrationError, match="holds NaN or infinite values"):
            chosen()


# --- weights in blocks


@pytest.mark.parametrize(
    ("width", "most", "block"),
    [(896, 128, 128), (4864, 256, 256), (96, 128, 32), (48, 64, 16), (64, 16, 16), (40, 128, 0), (17, 16, 0)],
)
def test_the_block_is_the_largest_that_divides_the_width(width: int, most: int, block: int) -> None:
    assert block_of(width, most) == block


def correlated(random: np.random.Generator, count: int = 240) -> Floats:
    """Activations that GPTQ makes use of, some channels louder."""
    mixing = random.standard_normal((K, K)) / (1 + np.arange(K))[:, None]
    rows = random.standard_t(4, (count, K)) @ mixing
    rows[:, random.choice(K, 3, replace=False)] *= 30
    return rows.astype(np.float32)


def test_the_method_is_the_one_that_errs_least_on_rows_it_has_not_seen(random: np.random.Generator) -> None:
    weights = weights_of(random, N, 32)
    observer = observed(correlated(random))
    scale, blocks = chosen_blocks(layers_of(*weights)[1], observer, 32, smooth=False)
    known, unseen = observer.sample[:180], observer.sample[180:]
    least, methods = [], []
    for name, weight in zip(("w0", "w1"), weights, strict=True):
        errors = {
            method: output_error(weight, fit(weight, 32, known, 4).dense(), unseen) for method, fit in FITS.items()
        }
        print({method: f"{error:.2%}" for method, error in errors.items()})
        method = min(errors, key=lambda method: errors[method])
        least.append(errors[method])
        methods.append(method)
        expected = FITS[method](weight, 32, observer.sample, 4)
        np.testing.assert_array_equal(blocks[name].values, expected.values)
        np.testing.assert_array_equal(blocks[name].scales, expected.scales)
    assert scale.error == pytest.approx(np.mean(least))
    assert scale.method == "/".join(dict.fromkeys(methods))
    assert scale.smooth == () and scale.layers == ("w0", "w1")


@pytest.mark.parametrize("best", FITS)
def test_any_method_can_win(best: str, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = {name: lambda weight, block, rows, bits: FITS["rounded"](weight * 2, block, rows, bits) for name in FITS}
    monkeypatch.setattr(choose_blocks, "FITS", {**coarse, best: FITS[best]})
    assert (
        chosen_blocks(layers_of(*weights_of(random, N))[1], observed(even(random)), 32, smooth=False)[0].method == best
    )


def test_layers_with_an_odd_number_of_columns_are_kept_in_8_bits(random: np.random.Generator) -> None:
    scale, blocks = chosen_blocks(
        layers_of(*weights_of(random, N, 33))[1], observed(correlated(random)), 128, smooth=True
    )
    assert {name: (found.bits, found.block, found.values.shape) for name, found in blocks.items()} == {
        "w0": (4, 64, (K, N)),
        "w1": (8, 64, (K, 33)),
    }
    assert np.abs(blocks["w1"].values).max() > 8
    assert scale.layers == ("w0", "w1")


def test_layers_that_no_block_divides_are_left_out(random: np.random.Generator) -> None:
    rows = random.standard_normal((50, 40)).astype(np.float32)
    scale, blocks = chosen_blocks(layers_of(*weights_of(random, N, rows=40))[1], observed(rows), 128, smooth=True)
    assert (scale.method, blocks, scale.smooth) == ("none", {}, ())
    assert scale.threshold == np.abs(rows).max()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("smooth", [False, True])
def test_few_rows_do(count: int, smooth: bool, random: np.random.Generator) -> None:
    weights, rows = weights_of(random, N), correlated(random, count)
    scale, blocks = chosen_blocks(layers_of(*weights)[1], observed(rows), 32, smooth=smooth)
    shift = np.array(scale.smooth or [0] * K, np.int32)
    dense = np.ldexp(blocks["w0"].dense(), -shift[:, None])
    assert 0 < scale.error < 1
    assert output_error(weights[0], dense, rows) < 0.3


def test_awqs_factors_are_taken_where_they_help(random: np.random.Generator) -> None:
    """Loud channels whose weights are small beside the others of their block."""
    rows, (weight,) = even(random), weights_of(random, N)
    rows[:, ::16] *= 60
    weight[::16] *= np.float32(0.1)
    _, linears = layers_of(weight)
    observer = observed(rows)
    plain, _ = chosen_blocks(linears, observer, 32, smooth=False)
    smooth, blocks = chosen_blocks(linears, observer, 32, smooth=True)
    print(f"error {plain.error:.2%}, with factors {smooth.error:.2%}: {smooth.smooth}")
    assert smooth.error < 0.9 * plain.error
    exponents = np.array(smooth.smooth)
    assert exponents[::16].min() > np.delete(exponents, np.arange(0, K, 16)).max()
    smoothed = np.ldexp(rows, -exponents.astype(np.int32))
    assert smooth.threshold == np.abs(smoothed).max()
    assert output_error(np.ldexp(weight, exponents[:, None]), blocks["w0"].dense(), smoothed) < 1.2 * smooth.error


@pytest.mark.parametrize(
    "factors",
    [
        lambda weights, rows, block: np.tile(np.array([1 / 32, 32], np.float32), K // 2),
        lambda weights, rows, block: np.ones(K, np.float32),
    ],
    ids=["harmful", "none"],
)
def test_awqs_factors_are_left_out_where_they_do_not_help(
    factors: Callable[..., Floats], random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_blocks, "awq_scales", factors)
    scale, blocks = chosen_blocks(layers_of(*weights_of(random, N))[1], observed(even(random)), 32, smooth=True)
    assert scale.smooth == () and set(blocks) == {"w0"}


def test_all_columns_of_a_wide_weight_are_fitted(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged on some of them."""
    weights, rows = weights_of(random, 100), correlated(random)
    monkeypatch.setattr(choose, "COLUMNS", 10)
    scale, blocks = chosen_blocks(layers_of(*weights)[1], observed(rows), 32, smooth=False)
    error = output_error(weights[0], blocks["w0"].dense(), rows)
    print(f"told {scale.error:.2%} of 10 columns, {error:.2%} of 100")
    assert blocks["w0"].values.shape == (K, 100)
    assert error < 2 * scale.error
