"""A tensor that lies where the graphs compute: cut along its leading axes there, copied to the host when it is read.

Knows no inference library: whoever owns the memory (``Block``) reads it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "DeviceTensor", "Index"]

Index = int | slice | tuple[int | slice, ...]


class Block(Protocol):
    """Memory of a device, which lives as long as the object."""

    address: int

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """A copy of ``size`` bytes on the host, after all work that was asked for is done."""


class DeviceTensor:
    """Values without gaps in a ``Block``.

    Attributes:
        block: the memory, kept alive.
        offset: bytes from its beginning.
        shape: of the values.
        dtype: of the values; NumPy has no bfloat16, which uint16 stands for.
    """

    def __init__(self, block: Block, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.offset = offset
        self.shape = shape
        self.dtype = dtype

    @property
    def address(self) -> int:
        """Of the first value."""
        return self.block.address + self.offset

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> DeviceTensor:
        """Leading axes: numbers, then at most one slice without a step; what is cut must have no gaps."""
        offset, shape = self.offset, self.shape
        parts = index if isinstance(index, tuple) else (index,)
        for number, part in enumerate(parts):
            row = math.prod(shape[1:]) * self.dtype.itemsize
            if isinstance(part, slice):
                start, stop, step = part.indices(shape[0])
                if step != 1 or number != len(parts) - 1:
                    raise IndexError(f"{index} would leave gaps; copy to the host with np.asarray first")
                return DeviceTensor(self.block, offset + start * row, (max(0, stop - start), *shape[1:]), self.dtype)
            if not -shape[0] <= part < shape[0]:
                raise IndexError(f"index {part} is outside an axis of {shape[0]}")
            offset, shape = offset + part % shape[0] * row, shape[1:]
        return DeviceTensor(self.block, offset, shape, self.dtype)

    def reshape(self, *shape: int) -> DeviceTensor:
        """The same values in another shape; one axis may be -1."""
        if -1 in shape:
            known = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // max(known, 1) if axis == -1 else axis for axis in shape)
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"{self.shape} has another number of values than {shape}")
        return DeviceTensor(self.block, self.offset, shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """A copy on the host; waits until the values are there."""
        if copy is False:
            raise ValueError("a tensor on a device cannot be an array without being copied")
        array = self.block.read(self.offset, self.nbytes).view(self.dtype).reshape(self.shape)
        return array if dtype is None else array.astype(dtype, copy=False)
