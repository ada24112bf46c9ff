"""A plan is chosen: every activation gets a scale, every layer its weights, and refusals say why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from calibration.linears import grouped
from calibration.observe import Observer
from calibration.options import QuantizeOptions
from calibration.plan import Plan, float_graph, planned
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
    options = QuantizeOptions(method="minmax", block=32)
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


def test_given_scales_are_taken_as_they_are(random: np.random.Generator, tmp_path: Path) -> None:
    spec, _ = gated(tmp_path, random, 32)
    given = {"p": entry(0.75, [1] * 64)}
    plan, _ = plan_for(tmp_path / spec.file, spec, observed(tmp_path / spec.file, random), given)
    assert plan.scales["p"] is given["p"] and plan.scales["x"].method == "minmax"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"p": entry(1, [1] * 63)}, ("63 exponents", "64 channels")),
        ({"x": entry(1, [1] * 32)}, ("32 exponents", "cannot be smoothed")),
        ({"nothing": entry(1)}, ("'nothing'", "stage.onnx")),
    ],
)
def test_given_scales_that_do_not_fit_are_refused(
    given: dict[str, TensorScale], words: tuple[str, ...], random: np.random.Generator, tmp_path: Path
) -> None:
    spec, _ = gated(tmp_path, random, 32)
    assert_refused(tmp_path / spec.file, spec, observed(tmp_path / spec.file, random), given, words=words)


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
