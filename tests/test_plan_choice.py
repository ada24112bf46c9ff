"""A plan is chosen: every activation gets a scale, every layer its weights, and refusals say why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from calibration.given import check_given
from calibration.linears import grouped
from calibration.lint import lint
from calibration.observe import Observer
from calibration.options import QuantizeOptions
from calibration.plan import Plan, built, float_graph, planned
from calibration.scales import TensorScale
from runtime.errors import CalibrationError
from runtime.manifest import StageSpec
from tests.plans import entry, gated, stage_file
from tests.text_graphs import normal


def observed(source: Path, random: np.random.Generator, size: float = 1) -> dict[str, Observer]:
    observers = {}
    for name, linears in grouped(float_graph(source)[1].values()).items():
        observers[name] = Observer(name)
        observers[name].add(normal(random, 40, linears[0].shape[0]) * np.float32(size))
    return observers


def plan_for(
    source: Path,
    spec: StageSpec,
    observers: Mapping[str, Observer],
    given: Mapping[str, TensorScale] | None = None,
    *,
    narrow: bool = False,
) -> tuple[Plan, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    options = QuantizeOptions(precision="int4" if narrow else "int8", method="minmax", block=32)
    plan = planned(
        source,
        spec,
        observers,
        options,
        narrow=narrow,
        given=given or {},
        progress=lambda number, count: told.append((number, count)),
    )
    return plan, told


@pytest.mark.parametrize("narrow", [False, True])
def test_every_activation_gets_a_scale_and_every_layer_its_weights(
    narrow: bool, random: np.random.Generator, tmp_path: Path
) -> None:
    spec, weights = gated(tmp_path, random, 32)
    observers = observed(tmp_path / spec.file, random)
    plan, told = plan_for(tmp_path / spec.file, spec, observers, narrow=narrow)
    assert plan.groups == ("x", "p") and told == [(1, 2), (2, 2)]
    assert plan.scales["x"].threshold == pytest.approx(observers["x"].histogram.largest)
    assert set(plan.blocks) == (set(weights) if narrow else set())
    assert {blocks.bits for blocks in plan.blocks.values()} <= {4}


def test_a_given_scale_is_taken_and_told_with_what_was_seen_here(random: np.random.Generator, tmp_path: Path) -> None:
    spec, _ = gated(tmp_path, random, 32)
    observers = observed(tmp_path / spec.file, random)
    given = msgspec.structs.replace(entry(0.75, [1] * 64), layers=("no layer",))
    plan, _ = plan_for(tmp_path / spec.file, spec, observers, {"p": given})
    found = plan.scales["p"]
    assert (found.threshold, found.smooth, found.method) == (given.threshold, given.smooth, given.method)
    assert found.layers == ("down",) and found.largest == observers["p"].histogram.largest and 0 < found.error < 1
    assert plan.scales["x"].method == "minmax"


def test_what_was_chosen_is_told_of_again_as_it_was(random: np.random.Generator, tmp_path: Path) -> None:
    spec, _ = gated(tmp_path, random, 32)
    observers = observed(tmp_path / spec.file, random)
    first, _ = plan_for(tmp_path / spec.file, spec, observers)
    second, _ = plan_for(tmp_path / spec.file, spec, observers, first.scales)
    assert second.scales == first.scales


HALVES = """
net (float16[1, rows, 32] x) => (float16[1, rows, 24] y) {
    h = LayerNormalization (x, gain, bias)
    y = MatMul (h, w)
}
"""


def halves(folder: Path, random: np.random.Generator, gain: float = 1, size: float = 1) -> StageSpec:
    """A norm and a layer in float16."""
    weights = {
        "gain": random.uniform(gain / 2, gain, 32).astype(np.float32).astype(np.float16),
        "bias": normal(random, 32).astype(np.float16),
        "w": (normal(random, 32, 24) * np.float32(size)).astype(np.float16),
    }
    return stage_file(HALVES, weights, folder, compute="float16")


def test_a_threshold_is_told_as_the_stage_holds_its_scale(random: np.random.Generator, tmp_path: Path) -> None:
    """float16 has no normal number below 2^-14."""
    spec = halves(tmp_path, random)
    plan, _ = plan_for(tmp_path / spec.file, spec, observed(tmp_path / spec.file, random, 1e-4))
    assert plan.scales["h"].threshold == 127 * 2.0**-14
    held = built(plan, ["h"]).graph.initializers["h.scale"].const_value
    assert held is not None and held.numpy() == np.float16(2.0**-14)


def test_smoothing_that_a_float16_norm_cannot_hold_is_not_chosen(random: np.random.Generator, tmp_path: Path) -> None:
    spec = halves(tmp_path, random, gain=60000)
    source = tmp_path / spec.file
    observers = {"h": Observer("h")}
    observers["h"].add(normal(random, 40, 32) * np.exp2(random.integers(-8, 9, 32)).astype(np.float32))
    smoothed, _ = plan_for(source, msgspec.structs.replace(spec, compute="float32"), observers)
    plan, _ = plan_for(source, spec, observers)
    assert smoothed.scales["h"].smooth and not plan.scales["h"].smooth


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"p": entry(1, [1] * 63)}, ("63 exponents", "64 channels")),
        ({"x": entry(1, [1] * 32)}, ("32 exponents", "cannot be smoothed")),
        ({"nothing": entry(1)}, ("'nothing'", "stage.onnx")),
    ],
    ids=["length", "no fold", "unknown"],
)
def test_given_scales_that_do_not_fit_are_refused(
    given: dict[str, TensorScale], words: tuple[str, ...], random: np.random.Generator, tmp_path: Path
) -> None:
    spec, _ = gated(tmp_path, random, 32)
    assert_misfit(tmp_path / spec.file, spec, given, words)


def assert_misfit(source: Path, spec: StageSpec, given: dict[str, TensorScale], words: tuple[str, ...]) -> None:
    with pytest.raises(CalibrationError) as caught:
        check_given("the table, stage 'vision'", source, spec, given)
    message = str(caught.value)
    print(message)
    assert message.startswith("the table, stage 'vision': the") and "\n" not in message and len(message) < 400
    assert all(word in message for word in words) and ";" in message, message


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (entry(1e-6), ("'h'", "threshold 1e-06", "float16 cannot hold", "0.00775 to 8.32e+06")),
        (entry(1e7), ("'h'", "threshold 1e+07", "float16 cannot hold")),
        (entry(1, [-20, 20] * 16), ("'h'", "-20 to 20", "gain leaves float16")),
        (entry(1, [30, 0] * 16), ("'h'", "0 to 30", "w leaves float16")),
    ],
    ids=["small", "large", "norm", "weight"],
)
def test_given_scales_that_float16_cannot_hold_are_refused(
    scale: TensorScale, words: tuple[str, ...], random: np.random.Generator, tmp_path: Path
) -> None:
    spec = halves(tmp_path, random)
    assert_misfit(tmp_path / spec.file, spec, {"h": scale}, words)


def test_given_scales_that_float16_holds_are_no_fault(random: np.random.Generator, tmp_path: Path) -> None:
    spec = halves(tmp_path, random)
    given = {"h": entry(127 * 2.0**-14, random.integers(-10, 11, 32))}
    check_given("the table", tmp_path / spec.file, spec, given)
    plan, _ = plan_for(tmp_path / spec.file, spec, observed(tmp_path / spec.file, random), given)
    assert lint(built(plan, ["h"]))


def assert_refused(
    source: Path,
    spec: StageSpec,
    observers: Mapping[str, Observer],
    given: Mapping[str, TensorScale] | None = None,
    *,
    narrow: bool = False,
    words: tuple[str, ...],
) -> None:
    with pytest.raises(CalibrationError) as caught:
        plan_for(source, spec, observers, given, narrow=narrow)
    message = str(caught.value)
    assert all(word in message for word in words) and ";" in message and len(message) < 400, message


@pytest.mark.parametrize("size", [0, 1e-35])
@pytest.mark.parametrize("narrow", [False, True])
def test_an_activation_that_was_always_0_is_refused(
    narrow: bool, size: float, random: np.random.Generator, tmp_path: Path
) -> None:
    spec, _ = gated(tmp_path, random, 32)
    observers = observed(tmp_path / spec.file, random, size)
    assert_refused(tmp_path / spec.file, spec, observers, narrow=narrow, words=("activation x was 0", "clips"))


def test_4_bits_for_no_layer_at_all_are_refused(random: np.random.Generator, tmp_path: Path) -> None:
    text = "net (float[1, rows, 24] x) => (float[1, rows, 32] y) { y = MatMul (x, w) }"
    spec = stage_file(text, {"w": normal(random, 24, 32)}, tmp_path)
    observers = observed(tmp_path / spec.file, random)
    assert_refused(tmp_path / spec.file, spec, observers, narrow=True, words=("block of 16", "--llm int8"))
