"""What a double does for the functions of CUDA's runtime API: the device and its memory, copies included.

Every method called ``cuda...`` is a function of ``cuda.bindings.runtime``: its arguments by their real names, the
values that follow the error code as its result. A failure is ``CallError`` with the name of CUDA's error; misuse that
CUDA would not notice is an AssertionError. Streams, events and graphs are ``stream_calls.py``'s.
"""

# ruff: noqa: N802, N803 - names are CUDA's

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.trt.cuda_module import NotModelledError
from tests.trt.memory import Memory
from tests.trt.stream_calls import StreamCalls
from tests.trt.streams import CallError, Stream

__all__ = ["CudaCalls", "Facts"]


@dataclass(frozen=True)
class Facts:
    """The device that a double stands for."""

    name: str
    sm: tuple[int, int]
    memory: int
    integrated: bool
    cuda: str


class CudaCalls(StreamCalls):
    """One device: its facts, its memory and, inherited, its queues."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.memory = Memory(facts.memory, integrated=facts.integrated)

    def live(self) -> list[str]:
        """Everything that was made and not yet destroyed, in words."""
        return [f"{b.size} bytes of {b.kind} memory by {b.where}" for b in self.memory.blocks] + self.live_handles()

    # Device

    def cudaGetDeviceCount(self) -> int:
        return 1

    def cudaGetDevice(self) -> int:
        return 0

    def cudaSetDevice(self, device: int) -> None:
        self._ordinal(device)

    def cudaSetDeviceFlags(self, flags: int) -> None:
        pass

    def cudaGetLastError(self) -> None:
        pass

    def cudaPeekAtLastError(self) -> None:
        pass

    def cudaDriverGetVersion(self) -> int:
        major, minor = self.facts.cuda.split(".")[:2]
        return int(major) * 1000 + int(minor) * 10

    def cudaRuntimeGetVersion(self) -> int:
        return self.cudaDriverGetVersion()

    def cudaGetDeviceProperties(self, device: int) -> Any:
        self._ordinal(device)
        found = self.module.cudaDeviceProp()
        facts = {
            "name": self.facts.name.encode(),
            "major": self.facts.sm[0],
            "minor": self.facts.sm[1],
            "totalGlobalMem": self.facts.memory,
            "integrated": int(self.facts.integrated),
            "multiProcessorCount": 8,
            "warpSize": 32,
        }
        for name, value in facts.items():
            setattr(found, name, value)
        return found

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> int:
        self._ordinal(device)
        values = {
            "cudaDevAttrComputeCapabilityMajor": self.facts.sm[0],
            "cudaDevAttrComputeCapabilityMinor": self.facts.sm[1],
            "cudaDevAttrIntegrated": int(self.facts.integrated),
            "cudaDevAttrMultiProcessorCount": 8,
            "cudaDevAttrWarpSize": 32,
        }
        if attr.name not in values:
            raise NotModelledError(f"the double knows no {attr.name}")
        return values[attr.name]

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.facts.memory - self.memory.used, self.facts.memory

    def cudaGetErrorString(self, error: Any) -> bytes:
        return str(error.name).encode()

    def cudaGetErrorName(self, error: Any) -> bytes:
        return str(error.name).encode()

    # Memory

    def cudaMalloc(self, size: int) -> int:
        return self._allocate(size, "device", "cudaMalloc")

    def cudaMallocHost(self, size: int) -> int:
        return self._allocate(size, "pinned", "cudaMallocHost")

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        return self._allocate(size, "pinned", "cudaHostAlloc")

    def cudaFree(self, devPtr: Any) -> None:
        self.queues.refuse_unsafe()
        if address(devPtr):
            self.memory.free(address(devPtr), "device", "cudaFree")

    def cudaFreeHost(self, ptr: Any) -> None:
        self.queues.refuse_unsafe()
        if address(ptr):
            self.memory.free(address(ptr), "pinned", "cudaFreeHost")

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: Any) -> None:
        self._copy_now(dst, count, src, count, count, 1, kind, "cudaMemcpy")

    def cudaMemcpy2D(self, dst: Any, dpitch: int, src: Any, spitch: int, width: int, height: int, kind: Any) -> None:
        self._copy_now(dst, dpitch, src, spitch, width, height, kind, "cudaMemcpy2D")

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: Any, stream: Any) -> None:
        self._copy(dst, count, src, count, count, 1, kind, self.stream(stream), "cudaMemcpyAsync")

    def cudaMemcpy2DAsync(
        self, dst: Any, dpitch: int, src: Any, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> None:
        self._copy(dst, dpitch, src, spitch, width, height, kind, self.stream(stream), "cudaMemcpy2DAsync")

    def cudaMemset(self, devPtr: Any, value: int, count: int) -> None:
        self._synchronous()
        self.memory.view(address(devPtr), count, "cudaMemset", "device")[:] = value & 0xFF

    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> None:
        self.cudaMemset2DAsync(devPtr, count, value, count, 1, stream)

    def cudaMemset2DAsync(self, devPtr: Any, pitch: int, value: int, width: int, height: int, stream: Any) -> None:
        start, what = address(devPtr), "cudaMemsetAsync"

        def run() -> None:
            self._rows(start, pitch, width, height, "device", what)[...] = value & 0xFF

        self._rows(start, pitch, width, height, "device", what)
        self.queues.enqueue(self.stream(stream), what, run)

    # Helpers

    def _ordinal(self, device: int) -> None:
        if device != 0:
            raise CallError("cudaErrorInvalidDevice")

    def _allocate(self, size: int, kind: Any, where: str) -> int:
        self.queues.refuse_unsafe()
        if size == 0:
            return 0
        block = self.memory.allocate(size, kind, where)
        if block is None:
            raise CallError("cudaErrorMemoryAllocation")
        return block.address

    def _synchronous(self) -> None:
        """What the default stream does: it waits for blocking streams, not for others."""
        for stream in self.queues.streams.values():
            if stream.capture and stream.blocking:
                stream.capture.broken = True
                raise CallError("cudaErrorStreamCaptureImplicit")
        self.queues.refuse_unsafe()
        for stream in list(self.queues.streams.values()):
            if stream.blocking:
                self.queues.drain(stream)

    def _rows(self, start: int, pitch: int, width: int, height: int, side: str, what: str) -> NDArray[np.uint8]:
        """(height, width) uint8, a view."""
        assert height <= 1 or width <= pitch, f"{what}: rows of {width} bytes, {pitch} bytes apart"
        if width == 0 or height == 0:
            return np.empty((height, width), np.uint8)
        size = pitch * (height - 1) + width
        data = (
            self.memory.view(start, size, what, "device") if side == "device" else self.memory.host(start, size, what)
        )
        return np.lib.stride_tricks.as_strided(data, (height, width), (pitch, 1))

    def _copy_now(
        self, dst: Any, dpitch: int, src: Any, spitch: int, width: int, height: int, kind: Any, what: str
    ) -> None:
        self._synchronous()
        target, source = sides(kind, what)
        to = self._rows(address(dst), dpitch, width, height, target, what)
        to[...] = self._rows(address(src), spitch, width, height, source, what)

    def _copy(
        self,
        dst: Any,
        dpitch: int,
        src: Any,
        spitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: Stream,
        what: str,
    ) -> None:
        target, source = sides(kind, what)
        to, start = address(dst), address(src)
        rows = self._rows(start, spitch, width, height, source, what)
        self._rows(to, dpitch, width, height, target, what)
        pageable = [a for a, side in ((to, target), (start, source)) if side == "host" and not self.memory.find(a)]
        assert not (pageable and stream.capture), f"{what}: pageable memory is captured; a graph would keep its address"
        # CUDA: a copy from pageable memory has staged it when the call returns, one to it has ended.
        staged = rows.copy() if start in pageable else None

        def run() -> None:
            data = self._rows(start, spitch, width, height, source, what) if staged is None else staged
            self._rows(to, dpitch, width, height, target, what)[...] = data.copy()

        self.queues.enqueue(stream, what, run)
        if to in pageable:
            self.queues.drain(stream)


def address(pointer: Any) -> int:
    """What cuda-python makes of a pointer argument: None, an integer, or an object with a buffer."""
    if pointer is None:
        return 0
    assert not isinstance(pointer, np.generic), "cuda-python takes a NumPy number for a buffer: its own address is used"
    if hasattr(pointer, "__index__") and not isinstance(pointer, np.ndarray):
        return int(pointer)
    view = memoryview(pointer)
    return int(np.frombuffer(view, np.uint8).ctypes.data) if view.nbytes else 0


def sides(kind: Any, what: str) -> tuple[str, str]:
    """Target and source, "host" or "device"."""
    found = {
        "cudaMemcpyHostToHost": ("host", "host"),
        "cudaMemcpyHostToDevice": ("device", "host"),
        "cudaMemcpyDeviceToHost": ("host", "device"),
        "cudaMemcpyDeviceToDevice": ("device", "device"),
    }.get(kind.name)
    assert found, f"{what}: {kind.name}: say which way"
    return found
