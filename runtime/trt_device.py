"""What all TensorRT engines of a backend share: one stream, staging memory, scratch memory, and TensorRT's runtime.

Work is asked of the stream and done later, in order. Whatever it uses is held until ``finish`` has waited for it.
Knows no engine and no stage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels import cuda
from runtime.backend import Array
from runtime.device_tensor import DeviceTensor
from runtime.dtypes import NUMPY
from runtime.errors import BackendError
from runtime.manifest import Dtype
from runtime.trt_log import Log, capturing

__all__ = ["ALIGNMENT", "TrtDevice", "advised", "aligned", "narrowed", "translated", "widened"]

ALIGNMENT = 256  # bytes; what cudaMalloc gives, and so what engines were timed with
NO_MEMORY = re.compile("out ?of ?memory|cudaErrorMemoryAllocation", re.IGNORECASE)  # as TensorRT and CUDA say it
USE_LESS = "use fewer frames or tokens, or --low-memory"


@contextmanager
def translated(what: str, log: Log | None = None) -> Iterator[None]:
    """Turn CUDA's errors, and those of TensorRT's bindings, into ``BackendError``, with what a log has of it."""
    try:
        yield
    except MemoryError as error:
        raise BackendError(f"not enough memory to {what}; {USE_LESS}") from error
    except RuntimeError as error:  # CudaError is one, and the bindings raise it
        said = log.error() if log else ""
        reason = f"{error!s:.300}" + (f" (TensorRT: {said})" if said else "")
        advice = advised(reason, "run python -m runtime.inspect on the bundle, or use --backend cpu")
        raise BackendError(f"TensorRT failed to {what}: {reason}; {advice}") from error


def advised(reason: str, otherwise: str) -> str:
    """What to do about a failure: less, where memory did not suffice."""
    return USE_LESS if NO_MEMORY.search(reason) else otherwise


def aligned(size: int) -> int:
    """Bytes rounded up, so that what comes behind is aligned."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def narrowed(array: Array, dtype: Dtype) -> Array:
    """Values as an engine takes them, without gaps; bfloat16 as its bits, rounded to the nearest even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, NUMPY[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    finite = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet: Array = np.where(np.isnan(array), ((bits >> 16) | 0x40).astype(np.uint16), finite)
    return quiet


def widened(array: Array, dtype: Dtype) -> NDArray[np.float32]:
    """What an engine gave, as a copy in float32."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


class DeviceBlock:
    """Device memory of which tensors are parts."""

    def __init__(self, device: TrtDevice, size: int) -> None:
        self.device = device
        self.memory = cuda.allocate(size)
        self.address = self.memory.address

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes on the host, after all work that was asked for is done."""
        found = np.empty(size, np.uint8)
        with self.device.asking():
            with translated("copy a result to the host"):
                cuda.download(found, self.address + offset, self.device.stream)
            self.device.finish()
        return found


class Staging:
    """Two pinned buffers in turns: one is filled while the other is still being copied from."""

    def __init__(self, stream: cuda.Stream) -> None:
        self.stream = stream
        self.buffers: list[cuda.Pinned | None] = [None, None]
        self.events = [cuda.Event(), cuda.Event()]
        self.turn = 0

    def upload(self, pieces: Sequence[tuple[int, Array]]) -> None:
        """Ask for host arrays to be copied to device addresses; the arrays are free again at once."""
        turn, self.turn = self.turn, 1 - self.turn
        self.events[turn].synchronize()
        size = sum(aligned(array.nbytes) for _, array in pieces)
        buffer = self.buffers[turn]
        if buffer is None or buffer.size < size:
            self.buffers[turn] = buffer = cuda.pinned(size)
        start = 0
        for address, array in pieces:
            staged = buffer.array[start : start + array.nbytes]
            staged[:] = array.reshape(-1).view(np.uint8)
            cuda.upload(address, staged, self.stream)
            start += aligned(array.nbytes)
        self.events[turn].record(self.stream)


class TrtDevice:
    """One stream and the memory that goes with it.

    Attributes:
        scratch: memory in which engines compute, one at a time; None before one asked for it.
        held: what work under way uses.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.log = capturing(trt)
        with translated("start", self.log):
            self.stream = cuda.Stream()
            self.staging: Staging | None = Staging(self.stream)
            self.runtime: Any = self.made_runtime()
        self.scratch: cuda.Memory | None = None
        self.held: list[object] = []

    def made_runtime(self) -> Any:
        """What deserialises engines."""
        try:
            return self.trt.Runtime(self.log.logger)
        except TypeError as error:  # what the bindings raise where a factory gives nothing
            raise BackendError(
                f"TensorRT does not start: {self.log.reason()}; check the NVIDIA driver, or use --backend cpu"
            ) from error

    def upload(self, pieces: Sequence[tuple[int, Array]]) -> None:
        """Ask for host arrays to be copied to device addresses."""
        assert self.staging is not None, "the backend is open"
        self.staging.upload(pieces)

    def empty(self, shape: tuple[int, ...], dtype: Dtype = "float32") -> DeviceTensor:
        """Memory for so many values."""
        size = math.prod(shape) * NUMPY[dtype].itemsize
        with translated(f"allocate {size} bytes"):
            return DeviceTensor(DeviceBlock(self, size), 0, shape, NUMPY[dtype])

    def hold(self, *objects: object) -> None:
        """Keep what work under way uses."""
        self.held += objects

    def reserve(self, size: int) -> cuda.Memory:
        """Scratch memory of at least so many bytes; who keeps its address compares it before every use."""
        if self.scratch is None or self.scratch.size < size:
            self.hold(self.scratch)
            self.scratch = None
            self.finish()  # frees the smaller one before the larger one is asked for
            with translated(f"allocate {size} bytes of scratch memory"):
                self.scratch = cuda.allocate(size)
        return self.scratch

    def finish(self) -> None:
        """Wait for all work that was asked for; failures of it arrive here."""
        with translated("compute", self.log):
            self.stream.synchronize()
        self.held.clear()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around all that asks for work: waits before an exception, Ctrl-C too, lets go of what the work uses."""
        try:
            yield
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Wait, whatever becomes of it: memory must not be freed under work that uses it."""
        with suppress(BackendError):
            self.finish()
        self.held.clear()

    def close(self) -> None:
        """Let go of memory and runtime, once engines are gone; tensors that are still in use keep the stream."""
        self.scratch = None
        self.staging = self.runtime = None
