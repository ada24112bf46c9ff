"""CUDA through cuda-python: device facts, memory, streams, events, graphs and kernels, with one error for all of them.

Addresses are plain integers, sizes are bytes. What is asked of a stream is done later, in order; whoever reads a
result, or writes again into what is being copied from, waits first. Needs ``cuda.bindings`` (cuda-python 12.6.2 or
newer), imported when the first function is called.

Knows no tensors and no TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CudaError",
    "Device",
    "Event",
    "Graph",
    "Kernel",
    "Memory",
    "Pinned",
    "Stream",
    "allocate",
    "capture",
    "copy",
    "copy_rows",
    "device",
    "download",
    "launch",
    "load_kernel",
    "memory_info",
    "pinned",
    "upload",
    "zero",
]


# What a user can do about an error, by its name.
ADVICE = {
    # Up to 12.6 cuda-python calls the driver; later ones bring a CUDA runtime of their own release ("Statically link
    # CUDA Runtime" in its notes of 12.8), which wants a driver as new.
    "cudaErrorInsufficientDriver": "cuda-python is newer than the NVIDIA driver; install the driver's CUDA, "
    "e.g. 'cuda-python==12.6.*'",
    "cudaErrorNoDevice": "CUDA finds no NVIDIA GPU; check nvidia-smi and CUDA_VISIBLE_DEVICES",
}


class CudaError(RuntimeError):
    """CUDA, or cuda-python, is absent or refused; the text is one line."""


@dataclass(frozen=True)
class Device:
    """The GPU that work goes to: CUDA's device 0, which CUDA_VISIBLE_DEVICES chooses.

    Attributes:
        sm: compute capability, e.g. (8, 7).
        processors: streaming multiprocessors; all of Jetson's Orin modules have one name and differ in these.
        memory: bytes in all.
        integrated: shares its memory with the host, as Jetson's do.
        cuda: newest CUDA the driver knows, e.g. (12, 6).
    """

    name: str
    sm: tuple[int, int]
    processors: int
    memory: int
    integrated: bool
    cuda: tuple[int, int]


@functools.cache
def runtime() -> Any:
    """``cuda.bindings.runtime``."""
    try:
        from cuda.bindings import runtime as found
    except ImportError as error:
        raise CudaError(f"cuda-python is not installed ({error}); install the extra [tensorrt]") from error
    return found


@functools.cache
def driver() -> Any:
    """``cuda.bindings.driver``."""
    try:
        from cuda.bindings import driver as found
    except ImportError as error:
        raise CudaError(f"cuda-python is not installed ({error}); install the extra [tensorrt]") from error
    return found


def call(name: str, *arguments: Any) -> Any:
    """One function of the runtime API; its values without the error code.

    Raises:
        CudaError: the function failed, or no CUDA driver was found.
    """
    return checked(name, functools.partial(getattr(runtime(), name), *arguments))


def checked(name: str, function: Callable[[], Any]) -> Any:
    """Call, and turn an error code into ``CudaError``."""
    try:
        error, *values = function()
    except RuntimeError as failure:  # cuda-python found no library to call
        raise CudaError(f"{name} cannot be called: {failure}; check the NVIDIA driver") from failure
    if int(error):
        advice = f": {ADVICE[error.name]}" if error.name in ADVICE else ""
        raise CudaError(f"{name} failed with {error.name} ({int(error)}){advice}")
    return values[0] if len(values) == 1 else tuple(values)


def device() -> Device:
    """Facts about the device.

    Raises:
        CudaError: there is none, or cuda-python is newer than its driver.
    """
    attributes = runtime().cudaDeviceAttr
    properties = call("cudaGetDeviceProperties", 0)
    version = call("cudaDriverGetVersion")
    return Device(
        name=properties.name.decode("utf-8", "replace").rstrip("\0"),
        sm=(
            call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, 0),
            call("cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, 0),
        ),
        processors=call("cudaDeviceGetAttribute", attributes.cudaDevAttrMultiProcessorCount, 0),
        memory=memory_info()[1],
        integrated=bool(call("cudaDeviceGetAttribute", attributes.cudaDevAttrIntegrated, 0)),
        cuda=(version // 1000, version % 1000 // 10),
    )


def memory_info() -> tuple[int, int]:
    """Bytes free and in all."""
    free, total = call("cudaMemGetInfo")
    return free, total


class Memory:
    """Device memory that is freed with the object; work that still uses it must have been waited for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address: int = int(call("cudaMalloc", max(size, 1)))
        weakref.finalize(self, release, runtime().cudaFree, self.address)


class Pinned:
    """Host memory that the device reads while the host goes on; ``array`` (size,) uint8 is a view of it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address: int = int(call("cudaMallocHost", max(size, 1)))
        buffer = (ctypes.c_uint8 * max(size, 1)).from_address(self.address)
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
        weakref.finalize(self, release, runtime().cudaFreeHost, self.address)


def release(free: Callable[[Any], Any], handle: Any) -> None:
    """Free when nobody can be told of a failure; the driver itself may be gone when Python ends."""
    with contextlib.suppress(RuntimeError):
        free(handle)


def allocate(size: int) -> Memory:
    """Device memory of ``size`` bytes."""
    return Memory(size)


def pinned(size: int) -> Pinned:
    """Pinned host memory of ``size`` bytes."""
    return Pinned(size)


class Stream:
    """A queue of work that does not wait for the default stream."""

    def __init__(self) -> None:
        made = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.handle = int(made)
        weakref.finalize(self, release, runtime().cudaStreamDestroy, self.handle)

    def synchronize(self) -> None:
        """Wait until all that was asked is done; failures of it arrive here."""
        call("cudaStreamSynchronize", self.handle)


class Event:
    """A mark in a stream."""

    def __init__(self) -> None:
        made = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)
        self.handle = int(made)
        weakref.finalize(self, release, runtime().cudaEventDestroy, self.handle)

    def record(self, stream: Stream) -> None:
        """Set the mark behind what was asked of ``stream`` so far."""
        call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait for the mark; returns at once where none was set."""
        call("cudaEventSynchronize", self.handle)


def upload(address: int, source: NDArray[Any], stream: Stream) -> None:
    """Host -> device. ``source`` is contiguous, and untouched until the stream has come so far if it is pinned."""
    assert source.flags.c_contiguous
    kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
    call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, stream.handle)


def download(target: NDArray[Any], address: int, stream: Stream) -> None:
    """Device -> host; ``target`` is contiguous and holds the values once the stream was waited for."""
    assert target.flags.c_contiguous
    kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
    call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, stream.handle)


def copy(target: int, source: int, size: int, stream: Stream) -> None:
    """Device -> device."""
    kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    call("cudaMemcpyAsync", target, source, size, kind, stream.handle)


def copy_rows(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int, stream: Stream
) -> None:
    """``rows`` pieces of ``width`` bytes, device -> device; pitches are the bytes from one piece to the next."""
    kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToDevice
    call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, stream.handle)


def zero(address: int, size: int, stream: Stream) -> None:
    """Zero bytes, on the device."""
    call("cudaMemsetAsync", address, 0, size, stream.handle)


class Graph:
    """Work that was captured once and is launched as a whole; addresses and shapes are those of the capture."""

    def __init__(self, captured: Any) -> None:
        self.handle = call("cudaGraphInstantiate", captured, 0)
        weakref.finalize(self, release, runtime().cudaGraphExecDestroy, self.handle)

    def launch(self, stream: Stream) -> None:
        """Ask ``stream`` for all of it."""
        call("cudaGraphLaunch", self.handle, stream.handle)


def capture(stream: Stream, work: Callable[[], None]) -> Graph:
    """Record what ``work`` asks of ``stream`` without doing it.

    Raises:
        CudaError: something in it cannot be captured; the stream is usable afterwards.
    """
    modes = runtime().cudaStreamCaptureMode
    with no_collection():
        try:
            call("cudaStreamBeginCapture", stream.handle, modes.cudaStreamCaptureModeThreadLocal)
            work()
            captured = call("cudaStreamEndCapture", stream.handle)
        except BaseException:
            abandon(stream)
            raise
    try:
        return Graph(captured)
    finally:
        release(runtime().cudaGraphDestroy, captured)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from collecting garbage: memory freed under a capture would end it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def abandon(stream: Stream) -> None:
    """End a capture that went wrong and forget it."""
    try:
        captured = call("cudaStreamEndCapture", stream.handle)
    except CudaError:
        return
    if captured is not None and int(captured):
        release(runtime().cudaGraphDestroy, captured)


@dataclass(frozen=True)
class Kernel:
    """A function of a loaded module; the module lives as long as the process."""

    entry: str
    function: Any


def load_kernel(ptx: bytes, entry: str) -> Kernel:
    """PTX text -> the function ``entry``, translated for this device by the driver.

    Raises:
        CudaError: the driver knows no PTX of this version, or there is no such entry.
    """
    call("cudaFree", 0)  # makes the runtime's context current, which the driver API then uses
    module = checked("cuModuleLoadData", lambda: driver().cuModuleLoadData(ptx.rstrip(b"\0") + b"\0"))
    return Kernel(entry, checked("cuModuleGetFunction", lambda: driver().cuModuleGetFunction(module, entry.encode())))


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    stream: int,
    arguments: Sequence[tuple[int, Any]],
) -> None:
    """Ask a stream, given by its handle, for one launch.

    Args:
        kernel: from ``load_kernel``.
        grid: blocks along x, y and z.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        stream: handle.
        arguments: value and ctypes type of each, in the kernel's order; None stands for an address.
    """
    values = tuple(value for value, _ in arguments)
    # To cuda-python itself None means an object that knows its own address, which a number does not.
    types = tuple(ctypes.c_void_p if kind is None else kind for _, kind in arguments)
    checked(
        "cuLaunchKernel",
        lambda: driver().cuLaunchKernel(kernel.function, *grid, threads, 1, 1, shared, stream, (values, types), 0),
    )
