"""What a double does for the functions of CUDA's driver API: PTX modules and kernel launches.

A launch is checked (entry, target, PTX version, number and types of arguments) and queued; what the kernel computes is
a Python function that a test gave for its entry. Without one, a launch that is executed is an AssertionError.
"""

# ruff: noqa: N802, N803 - names are CUDA's

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.trt.cuda_calls import CudaCalls
from tests.trt.memory import Memory
from tests.trt.streams import CallError, Stream

__all__ = ["DriverCalls", "KernelFunction", "Launch"]

# CUDA Toolkit release -> newest PTX ISA its driver translates: "PTX ISA", Release Notes.
PTX_OF_CUDA = {
    (12, 4): (8, 4),
    (12, 5): (8, 5),
    (12, 6): (8, 5),
    (12, 7): (8, 6),
    (12, 8): (8, 7),
    (12, 9): (8, 8),
    (13, 0): (9, 0),
    (13, 1): (9, 1),
    (13, 2): (9, 2),
}
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel; ``arguments`` are values, addresses as integers into ``memory``."""

    entry: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[Any, ...]
    memory: Memory
    image: bytes  # the PTX


KernelFunction = Callable[[Launch], None]


@dataclass(frozen=True)
class PtxModule:
    """A loaded module: entry -> number of its parameters."""

    entries: dict[str, int]
    image: bytes


class DriverCalls:
    """Public methods are functions of ``cuda.bindings.driver``, like those of ``CudaCalls``."""

    def __init__(self, device: CudaCalls) -> None:
        self.device = device
        self.module: Any = None  # cuda.bindings.driver
        self.kernels: dict[str, KernelFunction] = {}
        self.launches: list[Launch] = []
        self.modules: dict[int, PtxModule] = {}
        self.functions: dict[int, tuple[str, int, bytes]] = {}

    def cuInit(self, Flags: int) -> None:
        pass

    def cuDriverGetVersion(self) -> int:
        return self.device.cudaDriverGetVersion()

    def cuDeviceGet(self, ordinal: int) -> Any:
        return self.module.CUdevice(ordinal)

    def cuDeviceGetCount(self) -> int:
        return 1

    def cuCtxGetCurrent(self) -> Any:
        return self.module.CUcontext(1)

    def cuModuleLoadData(self, image: Any) -> Any:
        assert isinstance(image, bytes), f"cuModuleLoadData: {type(image).__name__} is no image"
        assert image.endswith(b"\0"), "cuModuleLoadData: PTX is to end in a NUL byte"
        if self.device.queues.captures:
            self.device.queues.refuse_unsafe()
        text = image.rstrip(b"\0").decode()
        version, target = re.search(r"\.version\s+(\d+)\.(\d+)", text), re.search(r"\.target\s+sm_(\d+)", text)
        entries = {name: len([p for p in body.split(",") if p.strip()]) for name, body in ENTRY.findall(text)}
        if not (version and target and entries):
            raise CallError("CUDA_ERROR_INVALID_PTX")
        cuda = tuple(int(part) for part in self.device.facts.cuda.split(".")[:2])
        if tuple(map(int, version.groups())) > PTX_OF_CUDA.get(cuda, max(PTX_OF_CUDA.values())):  # type: ignore[arg-type]
            raise CallError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
        major, minor = self.device.facts.sm
        if int(target[1]) > 10 * major + minor:
            raise CallError("CUDA_ERROR_INVALID_PTX")
        handle = 0xC0DE0000 + 0x100 * len(self.modules)
        self.modules[handle] = PtxModule(entries, image)
        return self.module.CUmodule(handle)

    def cuModuleGetFunction(self, hmod: Any, name: bytes) -> Any:
        loaded = self.modules[int(hmod)]
        found = loaded.entries
        if name.decode() not in found:
            raise CallError("CUDA_ERROR_NOT_FOUND")
        handle = 0xF00D0000 + 0x10 * len(self.functions)
        self.functions[handle] = (name.decode(), found[name.decode()], loaded.image)
        return self.module.CUfunction(handle)

    def cuModuleUnload(self, hmod: Any) -> None:
        del self.modules[int(hmod)]

    def cuFuncSetAttribute(self, hfunc: Any, attrib: Any, value: int) -> None:
        assert int(hfunc) in self.functions, "cuFuncSetAttribute: no such function"

    def cuLaunchKernel(
        self,
        f: Any,
        gridDimX: int,
        gridDimY: int,
        gridDimZ: int,
        blockDimX: int,
        blockDimY: int,
        blockDimZ: int,
        sharedMemBytes: int,
        hStream: Any,
        kernelParams: Any,
        extra: Any,
    ) -> None:
        entry, count, image = self.functions[int(f)]
        arguments = packed(kernelParams)
        assert len(arguments) == count, f"{entry} has {count} parameters, {len(arguments)} arguments were given"
        grid, block = (gridDimX, gridDimY, gridDimZ), (blockDimX, blockDimY, blockDimZ)
        threads = blockDimX * blockDimY * blockDimZ
        fits = min(grid) > 0 and gridDimX < 1 << 31 and max(gridDimY, gridDimZ) < 1 << 16
        if not (fits and 0 < threads <= 1024):
            raise CallError("CUDA_ERROR_INVALID_VALUE")
        launch = Launch(entry, grid, block, sharedMemBytes, arguments, self.device.memory, image)
        self.queue(launch, self.device.stream(hStream))

    def queue(self, launch: Launch, stream: Stream) -> None:
        """Ask a stream for a launch."""
        self.launches.append(launch)

        from tests.trt.gather_kernel import known_kernel  # which imports this module

        def run() -> None:
            computes = self.kernels.get(launch.entry) or known_kernel(launch.image)
            assert computes, f"the double was not told what the kernel {launch.entry} computes"
            computes(launch)

        self.device.queues.enqueue(stream, "cuLaunchKernel", run)


def packed(parameters: Any) -> tuple[Any, ...]:
    """The arguments of a launch, as cuda-python packs ``((values), (ctypes types))``."""
    if parameters in (None, 0):
        return ()
    form = isinstance(parameters, tuple) and len(parameters) == 2 and all(isinstance(p, tuple) for p in parameters)
    if not form:
        raise TypeError("Argument 'kernelParams' is not a valid type: tuple[tuple[Any, ...], tuple[Any, ...]]")
    values, kinds = parameters
    if len(values) != len(kinds):
        raise TypeError("Argument 'kernelParams' has tuples with different length")
    return tuple(pack(value, kind) for value, kind in zip(values, kinds, strict=True))


def pack(value: Any, kind: Any) -> Any:
    """One argument, cut to its type."""
    if kind is None:
        if not callable(getattr(value, "getPtr", None)):
            raise TypeError(f"Provided argument is of type {type(value)}, which without a ctypes type has no getPtr")
        return int(value)
    if kind is ctypes.c_void_p:
        return int(value)
    if not (isinstance(kind, type) and issubclass(kind, ctypes._SimpleCData)):
        raise TypeError(f"Unsupported type: {kind}")
    return kind(value).value
