"""Which layers have to stay in floating point for a stage to keep its accuracy.

First everything is quantised. Where that misses the target, every group of layers is quantised alone and its damage
measured; then the most harmful ones are left out, as few as hold the target. A group is what shares an activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from calibration.measure import Loss, floored
from runtime.errors import CalibrationError

__all__ = ["Kept", "Target", "TargetMissedError", "kept_groups"]

Measure = Callable[[Collection[str]], Loss]  # groups to quantise -> the stage's loss
Progress = Callable[[str], None]


class TargetMissedError(CalibrationError):
    """A stage that does not keep what was asked for, whatever stays in floating point."""


@dataclass(frozen=True)
class Target:
    """What a stage has to keep.

    Attributes:
        cosine: least cosine of any example.
        worth: least worth of SVR's selection.
    """

    cosine: float
    worth: float = 0.99

    def holds(self, loss: Loss) -> bool:
        """Whether a loss is within it; NaN is not."""
        return loss.cosine >= self.cosine and (loss.worth is None or loss.worth >= self.worth)


@dataclass(frozen=True)
class Kept:
    """What was decided for a stage.

    Attributes:
        groups: to quantise.
        floats: left in floating point, the most harmful first, with the damage each does alone.
    """

    groups: tuple[str, ...]
    loss: Loss
    floats: dict[str, float] = field(default_factory=dict)


def kept_groups(
    stage: str, groups: Sequence[str], measure: Measure, quick: Measure, target: Target, progress: Progress
) -> Kept:
    """Quantise as much of a stage as the target allows.

    Args:
        stage: its name.
        groups: all of them.
        measure: the loss over all examples.
        quick: the loss over few, for ranking.
        target: what has to hold.
        progress: told what is measured.

    Raises:
        TargetMissedError: the target does not hold with any group quantised.
    """
    progress(f"measure {stage}")
    everything = measure(groups)
    if target.holds(everything):
        return Kept(tuple(groups), everything)
    alone = {}
    for number, group in enumerate(groups, 1):
        progress(f"sensitivity {stage}: {number}/{len(groups)}")
        alone[group] = quick([group])
    damages = {group: damage(loss) for group, loss in alone.items()}
    order = sorted(groups, key=lambda group: -damages[group])  # of groups that do equal harm the first leaves first
    left, loss = fewest(order, measure, target)
    if loss is None:
        raise TargetMissedError(refusal(stage, target, everything, alone[order[-1]] if order else everything))
    floats = {group: damages[group] for group in order[:left]}
    return Kept(tuple(group for group in groups if group not in floats), loss, floats)


def damage(loss: Loss) -> float:
    """What a group does alone: what its cosine and its selection's worth lack; NaN is the worst."""
    lost = 1 - loss.cosine + (1 - loss.worth if loss.worth is not None else 0)
    return math.inf if math.isnan(lost) else lost


def refusal(stage: str, target: Target, everything: Loss, least: Loss) -> str:
    """Why a stage cannot be quantised: what was found with all groups, and with the least harmful one alone."""

    def told(cosine: float, worth: float | None) -> str:
        return f"cosine {cosine:.7g}" + ("" if worth is None else f", the selection's worth {worth:.5g}")

    def found(loss: Loss) -> str:
        return told(float(floored(loss.cosine, 7)), None if loss.worth is None else float(floored(loss.worth, 5)))

    wanted = told(target.cosine, None if everything.worth is None else target.worth)

    option = "--min-cosine-llm" if stage == "decode" else "--min-cosine"
    lower = f"ask for less with {option}, " if not everything.cosine >= target.cosine else ""
    return (
        f"{stage}: the target ({wanted}) does not hold with any layer quantised: {found(everything)} with all of them, "
        f"{found(least)} with the least harmful one alone; {lower}give more clips or try another --method"
    )


def fewest(order: Sequence[str], measure: Measure, target: Target) -> tuple[int, Loss | None]:
    """The fewest of ``order``, from its start, to leave out, by bisection; and the loss that was measured then."""
    low, high, found = 0, len(order), None  # leaving out ``low`` misses the target
    while high - low > 1:
        middle = (low + high) // 2
        loss = measure(order[middle:])
        if target.holds(loss):
            high, found = middle, loss
        else:
            low = middle
    return high, found
