"""Whether entries of a scale table fit a stage: what can be known of that before a clip is played.

Does not read tables (``scales`` does) and does not judge how accurate an entry is: that is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from calibration.insert import LEVELS, SMALLEST
from calibration.linears import Linear, grouped
from calibration.plan import DTYPES, can_fold, float_graph
from calibration.scales import ScaleTable, TensorScale
from calibration.smooth import fold_of, leaves, overflowing
from calibration.thresholds import METHODS
from runtime.bundle import Bundle
from runtime.errors import CalibrationError
from runtime.manifest import StageSpec

__all__ = ["check_given", "check_table", "given_entries"]

BY_HAND = "by hand"


def given_entries(
    path: str, table: ScaleTable, bundle: Bundle, stages: Sequence[str], note: Callable[[str], None]
) -> dict[str, Mapping[str, TensorScale]]:
    """Entries of a table by stage and activation, checked.

    Args:
        path: the table's, for errors.
        table: made for the weights of ``bundle``.
        bundle: the float bundle.
        stages: those that become W8A8; others have no use for entries.
        note: told which entries are not used.

    Raises:
        CalibrationError: one does not fit, or there is none that is of use.
    """
    check_table(path, table, table.stages.keys() - set(stages))
    used: dict[str, Mapping[str, TensorScale]] = {}
    for stage, found in table.stages.items():
        if stage not in stages:
            note(f"{stage}: does not become W8A8; the scale table's {len(found.tensors)} entries are not used")
        elif found.tensors:
            spec = bundle.manifest.stages[stage]
            check_given(f"{path}, stage {stage!r}", bundle.path(spec.file), spec, found.tensors)
            used[stage] = found.tensors
    return used


def check_table(path: str, table: ScaleTable, unused: Collection[str]) -> None:
    """What can be refused of a table before there is a bundle.

    Args:
        path: the table's, for errors.
        table: of any model.
        unused: stages that do not become W8A8.

    Raises:
        CalibrationError: there is no entry for any other stage, or one is of a method of 4-bit weights.
    """
    found = {stage: scales.tensors for stage, scales in table.stages.items() if stage not in unused}
    if not any(found.values()):
        raise CalibrationError(
            f"{path} has no entry that is of use, expected some for a stage that becomes W8A8; leave out --scales or "
            "give another table"
        )
    for stage, tensors in found.items():
        for name, scale in tensors.items():
            if scale.method not in (*METHODS, BY_HAND):
                raise CalibrationError(
                    f"{path}, stage {stage!r:.40}: the entry for {name!r:.80} is of method {scale.method!r:.40}, which "
                    f"is one of 4-bit weights, expected one of {', '.join(METHODS)} or {BY_HAND!r}; correct the entry, "
                    "remove it or calibrate again"
                )


def check_given(place: str, source: Path, spec: StageSpec, given: Mapping[str, TensorScale]) -> None:
    """Refuse entries that do not fit.

    Args:
        place: the table and its part; errors begin with it.
        source: the float graph's file.
        spec: what the manifest says about it.
        given: entries by activation.

    Raises:
        CalibrationError: an unknown activation, a scale that the stage cannot hold, or smoothing that is not possible
            or leaves the stage's range.
    """
    _, layers = float_graph(source)
    groups = grouped(layers.values())
    for name, scale in given.items():
        if name not in groups:
            raise CalibrationError(
                f"{place}: there is an entry for {name!r:.80}, which no layer of {source.name} reads; remove the entry "
                "or calibrate again"
            )
        if fault := misfit(scale, groups[name], layers, spec):
            raise CalibrationError(
                f"{place}: the entry for {name!r:.80} {fault}; correct the entry, remove it or calibrate again"
            )


def misfit(scale: TensorScale, linears: Sequence[Linear], layers: Mapping[str, Linear], spec: StageSpec) -> str:
    """What is wrong with an entry, or nothing."""
    dtype = DTYPES[spec.compute]
    step = scale.threshold / LEVELS
    if step < SMALLEST[dtype] or leaves(np.array([step], np.float32), dtype):
        most = np.finfo(dtype.numpy()).max
        return (
            f"has the threshold {scale.threshold:g}, whose scale {spec.compute} cannot hold, expected "
            f"{LEVELS * SMALLEST[dtype]:.3g} to {LEVELS * float(most):.3g}"
        )
    return unfit_smoothing(scale, linears, layers, spec) if scale.smooth else ""


def unfit_smoothing(
    scale: TensorScale, linears: Sequence[Linear], layers: Mapping[str, Linear], spec: StageSpec
) -> str:
    """What is wrong with an entry's exponents, or nothing."""
    width, fold = linears[0].shape[0], fold_of(linears, layers)
    if fold is None or not can_fold(fold, spec):
        return f"smooths with {len(scale.smooth)} exponents, and the activation cannot be smoothed"
    if len(scale.smooth) != width:
        return f"smooths with {len(scale.smooth)} exponents, and the activation has {width} channels"
    constant = overflowing(fold, linears, layers, np.array(scale.smooth, np.int8), DTYPES[spec.compute])
    extremes = f"{min(scale.smooth)} to {max(scale.smooth)}"
    return f"smooths by exponents of {extremes}, with which {constant} leaves {spec.compute}" if constant else ""
