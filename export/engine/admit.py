"""What is refused before anything is built: operators that TensorRT would not take, and engines that would not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from export.check import check_bundle
from export.engine.advice import Asked, changes, suggestion
from export.engine.estimate import Estimate, estimate
from export.engine.fit import Room, fits, mib
from export.engine.lowered import LoweredStage
from export.engine.options import MIB, BuildOptions
from export.engine.shapes import Ranges
from runtime.bundle import Bundle
from runtime.errors import BackendError

__all__ = ["check_operators", "estimate_of", "judge"]

Say = Callable[[str], None]


def check_operators(bundle: Bundle, version: str, say: Say) -> None:
    """Refuse what this TensorRT's parser would refuse.

    Raises:
        BackendError: some node.
    """
    report = check_bundle(bundle, [version])
    for note in report.notes:
        say(note)
    if not report:
        first, *more = report.problems
        raise BackendError(
            f"TensorRT would not take this bundle: {first:.300}{f' ({len(more)} more)' if more else ''}; see "
            f"python -m export.check {bundle.folder} --tensorrt {version}"
        )


def estimate_of(
    bundle: Bundle, stages: Iterable[LoweredStage], ranges: Ranges, options: BuildOptions, *, wide: bool = False
) -> Estimate:
    """Memory of all engines; ``wide`` as if they computed in float32."""
    workspace = None if options.workspace is None else options.workspace * MIB
    return estimate(bundle.manifest, stages, ranges, workspace, wide=wide)


def judge(
    bundle: Bundle, stages: dict[str, LoweredStage], ranges: Ranges, options: BuildOptions, room: Room, say: Say
) -> Estimate:
    """Refuse what would not fit, with what would; a note where only one engine at a time does.

    Raises:
        BackendError: too little memory, and not ``--force``.
    """
    found = estimate_of(bundle, stages.values(), ranges, options)
    how = fits(found, room)
    if how == "one by one":
        say(f"all engines together need {mib(found.together)} MiB of {mib(room.device)}: run with --low-memory")
    if how or options.force:
        return found

    @cache
    def estimated(other: Ranges, wide: bool) -> Estimate:
        return estimate_of(bundle, stages.values(), other, options, wide=wide)

    advice = suggestion(changes(Asked(bundle.manifest, options, ranges, estimated)), room)
    building = max(sum(found.building(stage)) for stage in found.stages)
    raise BackendError(
        f"memory: the engines need {mib(found.together)} MiB together, {mib(found.one_by_one)} MiB one at a time, and "
        f"up to {mib(building)} MiB while they are built, {mib(room.device)} MiB are free; {advice}; --force builds "
        "all the same"
    )
