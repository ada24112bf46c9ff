"""Whether a device's memory suffices for building and running engines.

Measures nothing but the memory that is free; what to ask for where it does not suffice is ``advice``'s to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.engine.estimate import Estimate
from export.engine.options import MIB
from kernels import cuda

__all__ = ["How", "Room", "fits", "mib", "room_of"]

MEMINFO = Path("/proc/meminfo")

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


def mib(size: int) -> int:
    """Bytes in MiB, rounded up."""
    return -(-size // MIB)
