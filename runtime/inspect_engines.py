"""The TensorRT engines beside a bundle, put into words: for which target, how large, for which shapes, fit or not.

Opens no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import Bundle
from runtime.choose_backend import target_here, without_advice
from runtime.engines import ENGINES, EngineRecord, ShapeRange, Target, differences, engine_folder, read_record
from runtime.errors import BackendError, DependencyError
from runtime.manifest import STAGES

__all__ = ["EngineSet", "engine_lines", "engine_sets"]


@dataclass(frozen=True)
class EngineSet:
    """The engines of one folder.

    Attributes:
        unfit: why they cannot be used here, one line; empty where they can.
    """

    folder: str
    records: dict[str, EngineRecord]
    unfit: str


def engine_sets(bundle: Bundle) -> list[EngineSet]:
    """All that were built, by folder."""
    folders = sorted(path for path in (bundle.folder / ENGINES).glob("*-trt*") if path.is_dir())
    if not folders:
        return []
    target, reason = here()
    return [engine_set(bundle, folder, target, reason) for folder in folders]


def here() -> tuple[Target | None, str]:
    """What engines would run on, or why there is nothing."""
    try:
        return target_here(), ""
    except (BackendError, DependencyError) as error:
        return None, without_advice(error)


def engine_set(bundle: Bundle, folder: Path, target: Target | None, reason: str) -> EngineSet:
    """One folder."""
    records: dict[str, EngineRecord] = {}
    unfit = reason
    for stage in sorted(bundle.manifest.stages, key=STAGES.index):
        path = folder / f"{stage}.json"
        try:
            records[stage] = read_record(path)
        except BackendError as error:
            unfit = unfit or (str(error) if path.exists() else f"the {stage} engine is missing")
    if target and not unfit:
        unfit = why_unfit(bundle, folder, records, target)
    return EngineSet(folder.name, records, unfit)


def why_unfit(bundle: Bundle, folder: Path, records: dict[str, EngineRecord], target: Target) -> str:
    """What differs of the first engine that does not fit."""
    for stage, record in records.items():
        if found := differences(record, bundle, stage, target):
            return f"{stage}: {'; '.join(found)}"
    return "" if folder == engine_folder(bundle, target) else f"expected in {engine_folder(bundle, target).name}"


def engine_lines(found: EngineSet) -> Iterator[str]:
    """One folder in words."""
    yield f"  engines     {found.folder}: {f'not here: {found.unfit}' if found.unfit else 'fit this device'}"
    for stage, record in found.records.items():
        plugin = f", plugin {record.plugin.kind}" if record.plugin else ""
        yield f"    {stage:<9} {record.size / 1e6:.1f} MB{plugin}, {' | '.join(map(profile_words, record.profiles))}"


def profile_words(profile: dict[str, ShapeRange]) -> str:
    """The inputs of a profile whose shapes are free; of the KV cache's layers the first."""
    shown = {
        name: shapes
        for name, shapes in profile.items()
        if shapes.least != shapes.most and (not name.startswith("past_") or name == "past_key.0")
    }
    words = (f"{name} {list(shapes.least)} to {list(shapes.most)}" for name, shapes in shown.items())
    return "; ".join(words) or "one shape"
