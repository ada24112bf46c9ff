"""What a build would do and need, without a GPU or TensorRT where a version is named: for ``--dry-run``.

Finds the plugin's kernels as a build does, but registers nothing: whether TensorRT takes the plugin, and before 10.9
whether cuda-python is there, the device's own build finds out, which takes the function body otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calibration.trt_rules import RELEASES
from export.engine.admit import check_operators, estimate_of, judge
from export.engine.device import REFINE, found_device, pool_scales
from export.engine.estimate import Estimate
from export.engine.fit import Room, fits, mib, room_of
from export.engine.lowered import lowered_stages
from export.engine.options import MIB, BuildOptions
from export.engine.shapes import chosen_stages, ranges_of
from export.lower import release_of
from kernels.ptx import KernelError
from kernels.register import kernels_for
from runtime.bundle import Bundle
from runtime.errors import BackendError, DependencyError
from runtime.manifest import STAGES

__all__ = ["rehearsed"]

Say = Callable[[str], None]
ORIN = (8, 7)  # compute capability of the oldest Jetson that TensorRT 10 runs on; kernels for it run on newer ones


@dataclass(frozen=True)
class Surroundings:
    """The device that is here, or the one that was named.

    Attributes:
        tensorrt: its version.
        sm: compute capability of its GPU.
        room: its memory; None where it is not known.
    """

    tensorrt: str
    sm: tuple[int, int]
    room: Room | None


def rehearsed(path: str, options: BuildOptions, version: str | None, memory: int | None, say: Say) -> Iterator[str]:
    """Check and estimate; the table comes as lines.

    Args:
        path: the bundle's folder.
        options: as for a build.
        version: of TensorRT; None for the one that is installed, else the newest known.
        memory: MiB of a device that shares its memory with the host, as Jetson's do; None for the GPU that is here,
            and where none is for such a device of as much as ``options`` make do with.
        say: told what is not part of the table.

    Raises:
        BundleError, OptionError: as of a build.
        BackendError: it would be refused: an operator, or too little memory.
    """
    bundle = Bundle.open(path)
    chosen = chosen_stages(bundle.manifest, options.stages)
    ranges = ranges_of(bundle.manifest, options)
    device = surroundings(options, memory)
    release = release_of(version or device.tensorrt)
    check_operators(bundle, release.version, say)
    plugin = options.plugin and REFINE in chosen and has_kernels(bundle, device.sm, options, say)
    stages = [stage for stage in STAGES if stage in bundle.manifest.stages]
    lowered = lowered_stages(bundle, stages, release, ranges, plugin=plugin)
    yield from table(estimate_of(bundle, lowered.values(), ranges, options), release.version)
    if device.room:
        found = judge(bundle, lowered, ranges, options, device.room, say)
        how = "fits" if fits(found, device.room) else "--force would build it, but it does not fit"
        yield f"{how} into {mib(device.room.device)} MiB"


def surroundings(options: BuildOptions, memory: int | None) -> Surroundings:
    """What is here; the newest TensorRT and a Jetson where there is nothing. Memory that was named holds."""
    limits = [size * MIB for size in (memory, options.max_memory) if size is not None]
    jetson = Room(min(limits), unified=True) if limits else None
    try:
        here = found_device()
    except (DependencyError, BackendError):
        return Surroundings(list(RELEASES)[-1], ORIN, jetson)
    if memory is not None:
        return Surroundings(here.target.tensorrt, ORIN, jetson)
    most = None if options.max_memory is None else options.max_memory * MIB
    return Surroundings(here.target.tensorrt, here.target.sm, room_of(here.gpu, here.free, most))


def has_kernels(bundle: Bundle, sm: tuple[int, int], options: BuildOptions, say: Say) -> bool:
    """Whether a build would find the plugin's kernels, as ``kernels.register`` looks for them; else it says why not."""
    scales = pool_scales(bundle)
    if scales is None:
        return False
    try:
        kernels_for(sm, options.ptx, scales=scales, dtypes=[bundle.manifest.stages[REFINE].compute])
    except KernelError as error:
        say(f"{REFINE}: no plugin, {error}")
        return False
    return True


def table(found: Estimate, version: str) -> Iterator[str]:
    """MiB of every stage, and what is needed at a time."""
    columns = ("weights", "activations", "buffers", "cache", "building")
    yield f"MiB for TensorRT {version}, upper bounds"
    yield f"{'':<10}" + "".join(f"{column:>13}" for column in columns)
    for stage in found.stages:
        sizes = (stage.weights.total, stage.activations, stage.buffers + stage.staging, stage.cache)
        row = (*sizes, sum(found.building(stage)))
        yield f"{stage.stage:<10}" + "".join(f"{size / MIB:>13.1f}" for size in row)
    yield f"workspace {found.workspace / MIB:.1f}, a video's features {found.features / MIB:.1f}"
    yield f"running: {mib(found.together)} together, {mib(found.one_by_one)} one at a time (--low-memory)"
