"""Plain calls of cuda-python, for tests of its double: answers unpacked, streams, pinned memory, copies, captures."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

__all__ = ["SIZE", "capture", "down", "pinned", "stream_of", "up", "value"]

SIZE = 1024  # bytes of most allocations


def value(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    assert not int(error), error
    return values[0] if values else None


def stream_of(cuda: Any) -> Any:
    return value(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))


def pinned(cuda: Any, size: int = SIZE) -> tuple[int, np.ndarray[Any, Any]]:
    address = value(cuda.cudaMallocHost(size))
    return address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def up(cuda: Any, target: int, source: int, stream: Any, size: int = SIZE) -> None:
    value(cuda.cudaMemcpyAsync(target, source, size, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream))


def down(cuda: Any, target: int, source: int, stream: Any, size: int = SIZE) -> None:
    value(cuda.cudaMemcpyAsync(target, source, size, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream))


def capture(cuda: Any, stream: Any, mode: str = "Global") -> None:
    value(cuda.cudaStreamBeginCapture(stream, getattr(cuda.cudaStreamCaptureMode, f"cudaStreamCaptureMode{mode}")))
