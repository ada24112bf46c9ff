"""Which layers have to stay in floating point for a stage to keep its accuracy.

First everything is quantised. Where that misses the target, every group of layers is quantised alone and its damage
measured; then the most harmful ones are left out, as few as hold the target. A group is what shares an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from calibration.measure import Loss
from runtime.errors import CalibrationError

__all__ = ["Kept", "Target", "kept_groups"]

Measure = Callable[[Collection[str]], Loss]  # groups to quantise -> the stage's loss
Progress = Callable[[str], None]


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
        floats: left in floating point, the most harmful first, with the damage 1 - cosine each does alone.
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
        CalibrationError: the target does not hold with any group quantised.
    """
    progress(f"measure {stage}")
    everything = measure(groups)
    if target.holds(everything):
        return Kept(tuple(groups), everything)
    damages = {}
    for number, group in enumerate(groups, 1):
        progress(f"sensitivity {stage}: {number}/{len(groups)}")
        damages[group] = damage(quick([group]))
    order = sorted(groups, key=lambda group: -damages[group])
    left, loss = fewest(order, lambda rest: measure(rest), target)
    if left == len(order) or loss is None:
        raise CalibrationError(
            f"{stage}: the target (cosine {target.cosine:g}) does not hold with any layer quantised: cosine is "
            f"{everything.cosine:.5f} with all of them, and {1 - min(damages.values()):.5f} with the least harmful one "
            "alone; ask for less with --min-cosine, or give more clips"
        )
    return Kept(
        tuple(group for group in groups if group not in order[:left]), loss, {g: damages[g] for g in order[:left]}
    )


def damage(loss: Loss) -> float:
    """What a group does alone; NaN is the worst."""
    lost = 1 - loss.cosine + (1 - loss.worth if loss.worth is not None else 0)
    return lost if lost == lost else float("inf")


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
