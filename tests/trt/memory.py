"""Device and pinned memory of a double: blocks of host memory with real addresses, and every misuse an AssertionError.

Fresh blocks hold bytes that are NaN in every floating type, freed ones are kept apart for a while so that their
addresses stay recognisable. Knows no streams.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "Memory"]

ALIGNMENT = 256  # bytes; cudaMalloc's, CUDA C++ Programming Guide, "Device Memory Accesses"
FRESH, FREED = 0xFF, 0xDD
QUARANTINE = 64 << 20  # bytes of freed blocks that are kept

Kind = Literal["device", "pinned"]


@dataclass(eq=False)
class Block:
    """One allocation; ``where`` is the call that made it."""

    address: int
    size: int
    kind: Kind
    where: str
    data: NDArray[np.uint8] = field(repr=False)


class Memory:
    """What is allocated, of how much."""

    def __init__(self, total: int, *, integrated: bool) -> None:
        self.total = total
        self.integrated = integrated
        self.peak = 0
        self._addresses: list[int] = []  # sorted, of live blocks
        self._live: dict[int, Block] = {}
        self._freed: list[Block] = []

    @property
    def used(self) -> int:
        """Bytes of device memory in use; pinned memory is of the same chips where host and device share them."""
        return sum(block.size for block in self._live.values() if block.kind == "device" or self.integrated)

    @property
    def blocks(self) -> list[Block]:
        """Live allocations, by address."""
        return [self._live[address] for address in self._addresses]

    def allocate(self, size: int, kind: Kind, where: str) -> Block | None:
        """A fresh block, or None where memory does not suffice."""
        if (kind == "device" or self.integrated) and self.used + size > self.total:
            return None
        storage = np.full(size + ALIGNMENT, FRESH, np.uint8)
        start = -storage.ctypes.data % ALIGNMENT
        data = storage[start : start + size]
        block = Block(storage.ctypes.data + start, size, kind, where, data)
        bisect.insort(self._addresses, block.address)
        self._live[block.address] = block
        self.peak = max(self.peak, self.used)
        return block

    def free(self, address: int, kind: Kind, where: str) -> None:
        """Give a block back; freeing anything else is an AssertionError."""
        block = self._live.get(address)
        if block is None:
            raise AssertionError(f"{where}: {self.describe(address)} is not the start of a live allocation")
        assert block.kind == kind, f"{where}: {address:#x} is {block.kind} memory of {block.where}, not {kind} memory"
        del self._live[address]
        self._addresses.remove(address)
        block.data[:] = FREED
        self._freed.append(block)
        while sum(old.size for old in self._freed) > QUARANTINE and len(self._freed) > 1:
            self._freed.pop(0)

    def find(self, address: int) -> Block | None:
        """The live block that an address lies in."""
        place = bisect.bisect_right(self._addresses, address) - 1
        if place < 0:
            return None
        block = self._live[self._addresses[place]]
        return block if address < block.address + block.size else None

    def view(self, address: int, size: int, where: str, kind: Kind | None = None) -> NDArray[np.uint8]:
        """(size,) uint8, the bytes themselves; all of them must lie in one live block (of ``kind``)."""
        block = self.find(address)
        if block is None and size == 0:
            return np.empty(0, np.uint8)
        if block is None:
            raise AssertionError(f"{where}: {size} bytes at {self.describe(address)}")
        start = address - block.address
        assert start + size <= block.size, (
            f"{where}: {size} bytes, {start} bytes into {block.size} bytes of {block.where}, pass its end"
        )
        assert kind is None or block.kind == kind, (
            f"{where}: {address:#x} is {block.kind} memory, expected {kind} memory"
        )
        return block.data[start : start + size]

    def host(self, address: int, size: int, where: str) -> NDArray[np.uint8]:
        """The bytes of pageable or pinned host memory; device memory is refused."""
        block = self.find(address)
        if block is not None:
            return self.view(address, size, where, "pinned")
        assert not self._was_ours(address), f"{where}: {size} bytes at {self.describe(address)}"
        buffer: Any = (ctypes.c_uint8 * size).from_address(address)
        return np.ctypeslib.as_array(buffer)

    def describe(self, address: int) -> str:
        """An address, and what was there."""
        old = self._was_ours(address)
        return f"{address:#x}, which {'was freed: ' + old.where if old else 'is no live allocation'}"

    def _was_ours(self, address: int) -> Block | None:
        for block in reversed(self._freed):
            if block.address <= address < block.address + max(block.size, 1):
                return block
        return None
