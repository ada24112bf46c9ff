"""What is close enough: values, selections, answers, and the limits that a dtype sets."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibration.parity import STAGES, Row, Tolerance, greedy_row, selection_row, tolerance_of, value_row
from export.evidence import Case, Comparison
from runtime.manifest import QuantizedSpec, StageSpec


def test_scores_that_are_closer_than_the_noise_may_change_places() -> None:
    scores = np.array([3.0, 2.0, 1.0, 1.0 + 1e-6, 0.0], np.float32)
    tied = selection_row("chain", np.array([0, 1, 2]), np.array([0, 1, 3]), scores, Tolerance())
    assert tied.passed and tied.note == "overlap 66.7%, another order"
    worse = selection_row("chain", np.array([0, 1, 4]), np.array([0, 1, 3]), scores, Tolerance())
    assert not worse.passed


def test_a_token_kept_twice_is_a_departure() -> None:
    scores = np.array([3.0, 2.0, 1.0], np.float32)
    assert not selection_row("chain", np.array([0, 0]), np.array([0, 1]), scores, Tolerance()).passed


def test_the_order_of_a_selection_counts() -> None:
    scores = np.array([1.0, 3.0, 2.0], np.float32)
    best_first, in_time = np.array([1, 2]), np.array([1, 2])
    assert not selection_row("chain", best_first[::-1], best_first, scores, Tolerance()).passed
    assert not selection_row("chain", in_time[::-1], in_time, scores, Tolerance(), in_video_order=True).passed
    assert selection_row("chain", in_time, in_time, scores, Tolerance(), in_video_order=True).passed


def test_answers_may_part_only_where_the_best_two_tie() -> None:
    def logits(*gaps: float) -> list[np.ndarray]:
        """Steps in which token 5 is so far behind the best, and every other token further."""
        return [np.array([-9, 0, 0, 0, -9, -gap, -9, -9, -9, -9], np.float32) for gap in gaps]

    assert greedy_row("chain", [1, 2, 3], [1, 2, 3], logits(0, 0, 0), 0.1).passed
    tie = greedy_row("chain", [1, 5, 9], [1, 2, 3], logits(1, 0.05, 1), 0.1)
    assert tie.passed and tie.note == "1 of 3 tokens agree, then a gap of 0.05"
    assert not greedy_row("chain", [1, 5, 9], [1, 2, 3], logits(1, 0.5, 1), 0.1).passed
    assert not greedy_row("chain", [5], [2], logits(float("nan")), 0.1).passed


def test_nan_and_other_shapes_never_pass() -> None:
    one = np.ones(4, np.float32)
    for found, expected in (
        (one * np.nan, one),
        (one, one * np.nan),
        (one[:3], one),
        (one[None], one),
        (one * np.inf, one),
    ):
        assert not value_row("decode", "logits", "chain", found, expected, Tolerance(1e9, 0)).passed
    assert value_row("decode", "logits", "chain", one * 0, one * 0, Tolerance(0, 0)).cosine == 1


def test_the_chain_is_given_what_the_coarsest_dtype_so_far_allows() -> None:
    computes = {"vision": "float16", "refine": "float32", "aggregate": "float16", "decode": "bfloat16"}
    stages = {name: StageSpec("", (), (), compute=compute) for name, compute in computes.items()}  # type: ignore[arg-type]
    found = {
        (stage, scope): tolerance_of(stages, stage, scope).relative
        for stage in STAGES
        for scope in ("reference", "chain")
    }
    assert [found[stage, "reference"] for stage in STAGES] == [2e-2, 1e-4, 1e-4, 2e-2, 0.16]
    assert [found[stage, "chain"] for stage in STAGES] == [2e-2, 2e-2, 2e-2, 2e-2, 0.16]


def test_a_quantised_stage_is_given_what_its_weights_allow() -> None:
    spec = QuantizedSpec(weights="int8", activations="int8", layers=1, cosine=1, size_ratio=0.25)
    stages = {"vision": StageSpec("", (), ()), "refine": StageSpec("", (), (), quantized=spec)}
    found = [tolerance_of(stages, stage, "chain").relative for stage in ("vision", "refine", "embedding")]
    assert found == [1e-4, 5e-2, 5e-2]


def test_the_first_departure_is_the_earliest_stage_of_any_case() -> None:
    def case(*failed: str) -> Case:
        rows: list[Any] = [Row(stage, "tokens", "chain", 1, 1, 0, 0, stage not in failed) for stage in STAGES]
        return Case("v", "video", "q", 1, "", "", tuple(rows))

    result = Comparison("", "", {}, "cpu", Tolerance(), (case("decode"), case("refine", "aggregate"), case()))
    assert not result and result.first_departure and result.first_departure.stage == "refine"
    assert Comparison("", "", {}, "cpu", Tolerance(), (case(),)).first_departure is None
    assert Comparison("", "", {}, "cpu", Tolerance(), (case(),))
