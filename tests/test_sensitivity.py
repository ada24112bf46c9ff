"""As much of a stage is quantised as its target allows: what is left out, in which order, measured how often."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from calibration.measure import Loss
from calibration.sensitivity import Kept, Target, kept_groups
from runtime.errors import CalibrationError

GROUPS = tuple(f"g{number}" for number in range(13))
TARGET = Target(0.999)


def loss_of(damage: float, worth: float | None = None) -> Loss:
    return Loss(cosine=1 - damage, mean_cosine=1 - damage, relative=damage, worth=worth)


@dataclass
class Stage:
    """A stage whose groups do harm that adds up; what it was asked to measure."""

    harm: Mapping[str, float]
    whole: list[tuple[str, ...]] = field(default_factory=list)
    quick: list[tuple[str, ...]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    def loss(self, groups: Collection[str]) -> Loss:
        return loss_of(sum(self.harm.get(group, 0.0) for group in groups))

    def kept(self, target: Target = TARGET, groups: Collection[str] = GROUPS, stage: str = "vision") -> Kept:
        def measure(chosen: Collection[str]) -> Loss:
            self.whole.append(tuple(chosen))
            return self.loss(chosen)

        def quick(chosen: Collection[str]) -> Loss:
            self.quick.append(tuple(chosen))
            return self.loss(chosen)

        return kept_groups(stage, tuple(groups), measure, quick, target, self.steps.append)

    def refused(self, target: Target = TARGET, groups: Collection[str] = GROUPS, stage: str = "vision") -> str:
        with pytest.raises(CalibrationError) as caught:
            self.kept(target, groups, stage)
        text = str(caught.value)
        assert text.startswith(f"{stage}: ") and "\n" not in text and len(text) < 500
        return text


@dataclass
class Selecting(Stage):
    """Its groups harm the worth of SVR's selection and nothing else."""

    def loss(self, groups: Collection[str]) -> Loss:
        return loss_of(0.0, worth=1 - sum(self.harm.get(group, 0.0) for group in groups))


def test_where_the_target_holds_everything_is_quantised_and_measured_once() -> None:
    stage = Stage(dict.fromkeys(GROUPS, 1e-5))
    kept = stage.kept()
    assert (kept.groups, kept.floats) == (GROUPS, {})
    assert kept.loss == stage.loss(GROUPS)
    assert (stage.whole, stage.quick, stage.steps) == ([GROUPS], [], ["measure vision"])


@pytest.mark.parametrize("bad", [GROUPS[0], GROUPS[6], GROUPS[-1]])
@pytest.mark.parametrize("harm", [0.5, 1.5, math.nan])
def test_one_harmful_group_is_left_in_floating_point(bad: str, harm: float) -> None:
    stage = Stage({**dict.fromkeys(GROUPS, 1e-5), bad: harm})
    kept = stage.kept()
    assert kept.groups == tuple(group for group in GROUPS if group != bad)
    assert [*kept.floats] == [bad]
    assert kept.floats[bad] == pytest.approx(math.inf if math.isnan(harm) else harm)
    assert kept.loss == stage.loss(kept.groups)
    assert stage.steps[1:] == [f"sensitivity vision: {number}/13" for number in range(1, 14)]
    assert stage.quick == [(group,) for group in GROUPS]


def test_a_loss_that_is_no_number_is_the_worst_of_all() -> None:
    kept = Stage({"g1": 0.9, "g2": math.nan, "g3": 1.9, "g4": 0.0001}).kept()
    assert [*kept.floats] == ["g2", "g3", "g1"]


def test_the_fewest_are_left_out_the_most_harmful_first(random: np.random.Generator) -> None:
    harms = (10.0 ** random.uniform(-5, -2.5, len(GROUPS))).tolist()
    stage = Stage(dict(zip(GROUPS, harms, strict=True)))
    total = sum(harms)
    target = Target(1 - total * random.uniform(0.05, 0.9))
    kept = stage.kept(target)
    ranked = sorted(GROUPS, key=lambda group: -stage.harm[group])
    fewest = next(count for count in range(1, 13) if target.holds(stage.loss(ranked[count:])))
    assert [*kept.floats] == ranked[:fewest]
    assert kept.groups == tuple(group for group in GROUPS if group not in kept.floats)
    assert kept.floats == pytest.approx({group: stage.harm[group] for group in kept.floats})
    assert target.holds(kept.loss)


@pytest.mark.parametrize("count", [2, 3, 8, 100, 400])
def test_measurements_of_the_whole_stage_grow_with_the_logarithm(count: int, random: np.random.Generator) -> None:
    groups = [f"g{number}" for number in range(count)]
    bad = int(random.integers(1, count))
    stage = Stage(dict.fromkeys(groups[:bad], 0.01))
    kept = stage.kept(groups=groups)
    assert [*kept.floats] == groups[:bad]
    assert len(stage.whole) - 1 <= math.ceil(math.log2(count))
    assert len(stage.quick) == count


def test_of_groups_that_do_equal_harm_the_first_are_left_out() -> None:
    stage = Stage(dict.fromkeys(GROUPS, 0.0003))  # three of them are allowed
    assert [*stage.kept(Target(1 - 0.00095)).floats] == [*GROUPS[:10]]


def test_a_selections_lost_worth_counts_as_damage() -> None:
    stage = Selecting({"g3": 0.5, "g8": 0.004})
    kept = stage.kept()
    assert kept.floats == pytest.approx({"g3": 0.5})
    assert kept.loss.worth == pytest.approx(0.996)


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1]])
def test_where_no_group_can_be_quantised_it_is_refused_with_what_was_found(groups: tuple[str, ...]) -> None:
    text = Stage({**dict.fromkeys(GROUPS, 0.3), GROUPS[0]: 0.25}).refused(groups=groups)
    assert "the target (cosine 0.999) does not hold with any layer quantised" in text
    assert "cosine 0.75 with the least harmful one alone" in text
    assert "ask for less with --min-cosine, " in text


def test_the_refusal_names_the_llms_own_option() -> None:
    assert "ask for less with --min-cosine-llm, " in Stage(dict.fromkeys(GROUPS, 0.3)).refused(stage="decode")


def test_a_target_close_to_one_is_told_with_all_its_digits() -> None:
    text = Stage(dict.fromkeys(GROUPS, 1e-5)).refused(Target(0.9999999))
    assert "(cosine 0.9999999)" in text and "cosine 0.99987 with all of them" in text


def test_a_selection_that_cannot_be_kept_is_told_apart_from_a_cosine() -> None:
    text = Selecting(dict.fromkeys(GROUPS, 0.1)).refused(stage="refine")
    assert "the selection's worth 0.99)" in text and "the selection's worth 0.9 with the least harmful one" in text
    assert "--min-cosine" not in text


@pytest.mark.parametrize("harm", [math.nan, 0.5])
def test_a_stage_without_groups_that_misses_its_target_is_refused(harm: float) -> None:
    class Broken(Stage):
        def loss(self, groups: Collection[str]) -> Loss:
            return loss_of(harm)

    assert "does not hold with any layer quantised" in Broken({}).refused(groups=())
    assert "with any layer quantised" in Broken({}).refused(groups=GROUPS)


@pytest.mark.parametrize(
    ("loss", "holds"),
    [
        (loss_of(0.001), True),
        (loss_of(0.0011), False),
        (loss_of(math.nan), False),
        (loss_of(0.0, worth=0.99), True),
        (loss_of(0.0, worth=0.98), False),
        (loss_of(0.0, worth=math.nan), False),
    ],
)
def test_a_target_holds_at_its_very_bound_and_never_for_nan(loss: Loss, holds: bool) -> None:
    assert Target(1 - 0.001).holds(loss) is holds
