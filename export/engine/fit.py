"""Whether a device's memory suffices for building and running engines, and if not, which change would make it suffice.

Every suggestion was computed: with it, the estimate fits. Measures nothing but the memory that is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from calibration.options import QuantizeOptions
from export.engine.estimate import Estimate, StageMemory
from export.engine.options import MIB
from export.engine.shapes import Range, Ranges
from export.engine.weights import Weights
from kernels import cuda
from runtime.manifest import Manifest

__all__ = ["Change", "Room", "changes", "fits", "mib", "room_of", "suggestion"]

MEMINFO = Path("/proc/meminfo")
FEWEST_TOKENS = 256  # rows of prompt and answer below which a suggestion helps nobody
BLOCK = QuantizeOptions().block  # rows of a 4-bit weight that share a scale, as the quantiser has them
INT4 = 0.5  # bytes

How = Literal["together", "one by one"]


@dataclass(frozen=True)
class Room:
    """Bytes that may be used.

    Attributes:
        device: of the GPU's memory.
        host: of the host's, swap included; None where it is the same memory, or not known.
        unified: the host's copies of weights lie in the same memory (Jetson).
        swap: bytes of swap space that such copies may move to.
    """

    device: int
    host: int | None = None
    unified: bool = False
    swap: int = 0


@dataclass(frozen=True)
class Change:
    """Something to ask for in place of what was asked, and what it would take."""

    advice: str
    estimate: Estimate


def room_of(device: cuda.Device, free: int, most: int | None) -> Room:
    """What a device and its host have left.

    On an integrated GPU, what CUDA calls free is what the system has not handed out (cuMemGetInfo's documentation
    refers to the Tegra application note for more); the file cache can be had too, so Linux' own figure is taken
    where it is larger.

    Args:
        device: the GPU.
        free: bytes that CUDA calls free.
        most: bytes to make do with; None for all.
    """
    info = memory_lines(MEMINFO)
    available, swap = info.get("MemAvailable", 0), info.get("SwapFree", 0)
    if device.integrated:
        free = min(max(free, available), device.memory)
    usable = free if most is None else min(most, free)
    if device.integrated:
        return Room(usable, unified=True, swap=swap)
    return Room(usable, available + swap if available else None)


def memory_lines(path: Path) -> dict[str, int]:
    """Linux' figures in bytes, by name; empty where there are none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.replace(":", "").split() for line in lines)
    return {field[0]: int(field[1]) * 1024 for field in fields if len(field) == 3 and field[2] == "kB"}


def fits(estimate: Estimate, room: Room) -> How | None:
    """How engines can be run in a room in which they can be built; None where they cannot."""
    for stage in estimate.stages:
        host, device = estimate.building(stage)
        if room.unified and host + device > room.device + min(room.swap, host):
            return None
        if not room.unified and (device > room.device or (room.host is not None and host > room.host)):
            return None
    if estimate.together <= room.device:
        return "together"
    return "one by one" if estimate.one_by_one <= room.device else None


def suggestion(candidates: Iterator[Change], room: Room) -> str:
    """The first change that fits, in words."""
    for change in candidates:
        if how := fits(change.estimate, room):
            low = how == "one by one"
            need = change.estimate.one_by_one if low else change.estimate.together
            return f"{change.advice} ({mib(need)} MiB{', with --low-memory at run time' if low else ''})"
    return "no smaller size, float16, INT8 or INT4 would make it fit: take a smaller model or a larger device"


def changes(manifest: Manifest, ranges: Ranges, estimated: Callable[[Ranges], Estimate]) -> Iterator[Change]:
    """What can be asked for in place, what costs least first, and in the end all of it.

    Args:
        manifest: of the bundle.
        ranges: as asked.
        estimated: what the engines take for other ranges.
    """
    smaller = list(smaller_sizes(manifest, ranges))
    for advice, less in smaller:
        yield Change(f"give {advice}", estimated(less))
    now = estimated(ranges)
    narrow = list(narrower(manifest, now))
    yield from narrow
    if smaller:
        advice, least = smallest(manifest, ranges)
        yield Change(f"give {advice}", estimated(least))
        for last in narrower(manifest, estimated(least)):
            yield Change(f"{last.advice} and give {advice}", last.estimate)


def smaller_sizes(manifest: Manifest, ranges: Ranges) -> Iterator[tuple[str, Ranges]]:
    """One size after the other, halved as often as it makes sense."""
    for tokens in halves(ranges.tokens.most, min(FEWEST_TOKENS, ranges.tokens.most)):
        yield f"--max tokens={tokens}", replace(ranges, tokens=cut(ranges.tokens, tokens))
    if ranges.frames:
        for frames in halves(ranges.frames.most, manifest.frames.minimum):
            yield f"--max frames={frames}", replace(ranges, frames=cut(ranges.frames, frames))
    group = manifest.frames.group
    for groups in halves(ranges.batch.most // group, 1):
        yield f"--max batch={groups * group}", replace(ranges, batch=cut(ranges.batch, groups * group))


def smallest(manifest: Manifest, ranges: Ranges) -> tuple[str, Ranges]:
    """All sizes at their least."""
    least = {"tokens": min(FEWEST_TOKENS, ranges.tokens.most), "batch": manifest.frames.group}
    if ranges.frames:
        least["frames"] = manifest.frames.minimum
    words = ",".join(f"{key}={size}" for key, size in least.items())
    return f"--max {words}", replace(ranges, **{key: cut(getattr(ranges, key), size) for key, size in least.items()})


def halves(size: int, least: int) -> Iterator[int]:
    """Half of a size, half of that, down to the least."""
    while size > least:
        size = max(size // 2, least)
        yield size


def cut(sizes: Range, most: int) -> Range:
    """A range up to ``most``."""
    return Range(min(sizes.least, most), min(sizes.best, most), most)


def narrower(manifest: Manifest, now: Estimate) -> Iterator[Change]:
    """The same engines of another export or a quantised bundle, the least loss first."""
    quantized = any(spec.quantized for spec in manifest.stages.values())
    if any(manifest.stages[stage.stage].compute == "float32" for stage in now.stages if stage.stage != "refine"):
        half = replace(now, stages=tuple(map(halved, now.stages)))  # SVR stays in float32
        yield Change("export with --dtype float16", half)
    if quantized:
        return
    calibrate = "quantise it: python -m calibration BUNDLE CLIPS -o OTHER --precision"
    yield Change(f"{calibrate} int8", replace(now, stages=tuple(quantised(stage, 1) for stage in now.stages)))
    stages = tuple(quantised(stage, INT4 if stage.stage == "decode" else 1) for stage in now.stages)
    yield Change(f"{calibrate} int4", replace(now, stages=stages))


def halved(stage: StageMemory) -> StageMemory:
    """A float32 stage in 16 bits; its inputs and outputs stay float32."""
    weights = stage.weights
    if stage.stage == "refine" or weights.itemsize != 4:
        return stage
    less = Weights(weights.narrow, weights.linear // 2, weights.other // 2, 2)
    return replace(stage, weights=less, activations=stage.activations // 2, cache=stage.cache // 2)


def quantised(stage: StageMemory, element: float) -> StageMemory:
    """A stage whose linear layers' weights have ``element`` bytes, and in blocks a scale for each."""
    weights = stage.weights
    scales = weights.itemsize / BLOCK if element < 1 else 0
    narrow = int(weights.linear / weights.itemsize * (element + scales))
    return replace(stage, weights=Weights(weights.narrow + narrow, 0, weights.other, weights.itemsize))


def mib(size: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-size // MIB)
