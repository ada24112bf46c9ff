"""``make_engines``: the whole way from a bundle to engines beside it.

Checks first what can be known without building: the operators, the memory, what is up to date. Then one stage after
the other is parsed, built, opened once and put in place; what is done stays, whatever happens to the next.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engine.admit import check_operators, judge
from export.engine.builder import Settings, engine_facts, engine_from_onnx
from export.engine.cache import TimingCache
from export.engine.device import REFINE, BuildDevice, found_device, plugin_kernels, registered_plugin
from export.engine.estimate import WORKSPACE, Estimate
from export.engine.files import engine_paths, prepared, put_engine
from export.engine.fit import Room, room_of
from export.engine.kernels import put_kernels
from export.engine.lowered import LoweredStage, lowered_stages
from export.engine.options import MIB, BuildOptions
from export.engine.progress import Phases, Progress, monitor
from export.engine.shapes import Ranges, chosen_stages, ranges_of
from export.lower import release_of
from runtime.bundle import Bundle
from runtime.engines import PTX, EngineRecord, PluginRecord, differences, engine_folder, graph_hash, read_record
from runtime.errors import BackendError
from runtime.manifest import STAGES
from runtime.trt_log import Log, capturing

__all__ = ["make_engines"]

TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class Work:
    """One build of a bundle's engines.

    Attributes:
        plugin: the registered plugin; None where the function body is built.
        room: memory that may be used.
    """

    bundle: Bundle
    options: BuildOptions
    device: BuildDevice
    ranges: Ranges
    plugin: PluginRecord | None
    room: Room
    progress: Progress
    log: Log

    @property
    def folder(self) -> Path:
        """Where the engines go."""
        return engine_folder(self.bundle, self.device.target)


def make_engines(path: str, options: BuildOptions, progress: Progress, *, verbose: bool = False) -> Path:
    """Build what is not up to date.

    Args:
        path: the bundle's folder.
        options: what to build.
        progress: told what is done.
        verbose: pass on what TensorRT says.

    Returns:
        The folder of the engines.

    Raises:
        BundleError, OptionError, DependencyError: nothing was built.
        BackendError: no GPU, too little memory, or TensorRT refused a stage; stages before it are in place.
        OutputError: the folder cannot be written.
    """
    bundle = Bundle.open(path)
    chosen = chosen_stages(bundle.manifest, options.stages)
    ranges = ranges_of(bundle.manifest, options)
    device = found_device()
    check_operators(bundle, device.target.tensorrt, progress.say)
    plugin, reason = None, ""
    if options.plugin and REFINE in chosen:
        plugin, reason = registered_plugin(bundle, device.target.sm, options.ptx)
    room = room_of(device.gpu, device.free, options.max_memory and options.max_memory * MIB)
    log = capturing(device.trt, progress.say if verbose else None)
    work = Work(bundle, options, device, ranges, plugin, room, progress, log)
    release = release_of(device.target.tensorrt)
    stages = [stage for stage in STAGES if stage in bundle.manifest.stages]
    lowered = lowered_stages(bundle, stages, release, ranges, plugin=plugin is not None)
    due = [stage for stage in chosen if options.force or not up_to_date(work, lowered[stage])]
    for stage in chosen:
        if stage not in due:
            progress.say(f"{stage}: up to date")
    if reason and REFINE in due:
        progress.say(f"{REFINE}: {'no plugin, ' if plugin is None else 'plugin '}{reason}")
    if due:
        build_due(work, lowered, due)
    return work.folder


def up_to_date(work: Work, stage: LoweredStage) -> bool:
    """Whether an engine is there that a build would give again."""
    engine, description = engine_paths(work.folder, stage.stage)
    if not description.is_file() or not engine.is_file():
        return False
    try:
        record = read_record(description)
    except BackendError:
        return False
    same = (record.options, record.profiles, record.plugin) == (
        options_in_words(work.options, stage),
        stage.profiles,
        plugin_of(work, stage),
    )
    return same and not differences(record, work.bundle, stage.stage, work.device.target)


def plugin_of(work: Work, stage: LoweredStage) -> PluginRecord | None:
    """The plugin inside a stage's engine."""
    return work.plugin if stage.pools else None


def options_in_words(options: BuildOptions, stage: LoweredStage) -> dict[str, str]:
    """What makes another engine of the same graph."""
    return {
        "lowered graph": stage.sha256,
        "max-memory": "auto" if options.max_memory is None else f"{options.max_memory} MiB",
        "optimization-level": "default" if options.level is None else str(options.level),
        "tf32": "yes" if options.tf32 else "no",
        "workspace": "auto" if options.workspace is None else f"{options.workspace} MiB",
    }


def build_due(work: Work, lowered: dict[str, LoweredStage], due: list[str]) -> None:
    """Build these stages."""
    found = judge(work.bundle, lowered, work.ranges, work.options, work.room, work.progress.say)
    prepared(work.folder)
    cache = TimingCache(work.options.timing_cache or work.folder / TIMING_CACHE, work.progress.say)
    for stage in due:
        began = time.perf_counter()
        record = build_stage(work, lowered[stage], settings_for(work, found, stage), cache)
        sizes = f"{record.size / MIB:.1f} MiB, with {record.device_memory / MIB:.1f} MiB of scratch memory"
        work.progress.say(f"{stage}: built in {time.perf_counter() - began:.1f} s, {sizes}")


def settings_for(work: Work, found: Estimate, stage: str) -> Settings:
    """Limits as asked; on a GPU that shares its memory with the host, else what is free and what building leaves."""
    options, room = work.options, work.room
    workspace = None if options.workspace is None else options.workspace * MIB
    tactics = None if options.max_memory is None else options.max_memory * MIB
    if room.unified:
        memory = next(part for part in found.stages if part.stage == stage)
        taken = sum(found.building(memory)) - found.workspace
        workspace = workspace or max(room.device - taken, WORKSPACE)
        tactics = tactics or room.device
    aot = work.plugin is not None and work.plugin.kind == "aot"
    return Settings(workspace, tactics, options.level, options.tf32, aot)


def build_stage(work: Work, stage: LoweredStage, settings: Settings, cache: TimingCache) -> EngineRecord:
    """Build one engine and put it in place."""
    blob = built(work, stage, settings, cache)
    facts = engine_facts(work.device.trt, blob, work.log)
    content = memoryview(blob)
    record = EngineRecord(
        stage=stage.stage,
        target=work.device.target,
        graph=graph_hash(work.bundle, stage.stage),
        plugin=plugin_of(work, stage),
        options=options_in_words(work.options, stage),
        profiles=stage.profiles,
        inputs=facts.inputs,
        outputs=facts.outputs,
        size=content.nbytes,
        sha256=hashlib.sha256(content).hexdigest(),
        device_memory=facts.device_memory,
    )
    if record.plugin and record.plugin.kind == "v3":
        put_kernels(work.folder / PTX, plugin_kernels(work.bundle, work.device.target.sm, work.options.ptx))
    put_engine(work.folder, stage.stage, content, record)
    return record


def built(work: Work, stage: LoweredStage, settings: Settings, cache: TimingCache) -> Any:
    """The engine's bytes; a signal that came meanwhile is acted on after the call.

    Raises:
        BackendError: TensorRT gave none.
    """
    progress, phases = work.progress, Phases()
    work.log.clear()
    watch = monitor(
        work.device.trt, phases, lambda line: progress.show(f"{stage.stage}: {line}"), lambda: bool(progress.stopped)
    )
    with progress.holding_signals():
        blob = engine_from_onnx(work.device.trt, stage, settings, work.log, cache, watch)
    if blob is None:
        raise BackendError(
            f"TensorRT built no engine of {stage.stage}: {work.log.reason()}; -v shows all it said; less memory is "
            "needed with smaller --max sizes or --workspace"
        )
    return blob
