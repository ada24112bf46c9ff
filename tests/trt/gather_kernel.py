"""What the project's compiled kernels compute, for launches in a double: the NumPy oracle, told apart by their PTX.

Checks what a launch must be for the kernel to do all of its work. That the PTX does this is the kernels' tests'
business.
"""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np

from kernels.ptx import SHIPPED, Entry, read_index
from kernels.spec import gather_pool, pooled_length
from tests.trt.driver_calls import KernelFunction, Launch

__all__ = ["known_kernel"]

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def known_kernel(image: bytes) -> KernelFunction | None:
    """What the kernel of some PTX computes, None where it is none of the package's."""
    digest = hashlib.sha256(image.rstrip(b"\0")).hexdigest()
    for entry in read_index(SHIPPED).kernels:
        if entry.sha256 == digest:
            return lambda launch: compute(launch, entry)
    return None


def compute(launch: Launch, entry: Entry) -> None:
    """Read tokens and indices, write pooled."""
    tokens, indices, length, top_k, width, pooled = launch.arguments
    batch, dtype = launch.grid[2], DTYPES[entry.dtype]
    assert launch.grid == entry.layout.grid(batch, top_k, width), f"grid {launch.grid} does not cover the work"
    assert launch.block == (32 * entry.layout.warps, 1, 1), f"{launch.block} threads, {entry.layout.warps} warps"
    assert launch.shared == entry.shared, f"{launch.shared} bytes of shared memory, {entry.shared} are used"

    def view(address: int, shape: tuple[int, ...], kind: np.dtype[np.generic]) -> np.ndarray[tuple[int, ...], np.dtype]:
        size = int(np.prod(shape)) * kind.itemsize
        return launch.memory.view(address, size, launch.entry, "device").view(kind).reshape(shape)

    found = gather_pool(
        view(tokens, (batch, length, width), dtype), view(indices, (batch, top_k), np.dtype(np.int64)), entry.scales
    )
    view(pooled, (batch, pooled_length(top_k, entry.scales), width), dtype)[...] = found
