"""Compiled kernels: which file serves a device, and how it is launched.

``kernels/ptx`` holds PTX for the scales 1, 2, 4; ``python -m kernels.compile`` makes folders of the same form for
others. PTX of one architecture runs on every newer one as well, so a device takes the newest that is not newer than it.

Does not load or launch anything, and needs neither Triton nor CUDA.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

__all__ = [
    "ARGUMENTS",
    "ENTRY",
    "INDEX",
    "SHIPPED",
    "Entry",
    "Index",
    "Kernel",
    "KernelError",
    "Layout",
    "find",
    "layout_of",
    "read_index",
]

SHIPPED = Path(__file__).with_name("ptx")
INDEX = "index.json"
# Below 16 characters: the bindings of TensorRT 10.9 to 10.13 hand out the name's address after the string is gone
# (``getKernel`` in pyPlugin.cpp), and a longer one lay on the heap, where it is overwritten before it is read.
ENTRY = "gather_pool"
ARGUMENTS = ("tokens", "indices", "length", "top_k", "width", "pooled")  # TensorRT's order: inputs, scalars, outputs

MOST_ROWS = 32  # of a program that keeps all of them in registers: 32 x 16 bytes a thread are 128 of 255 registers
FEWEST_ROWS = 4  # reads in flight of one thread
BLOCK_ROWS = 64  # of a program that reads window by window
COLUMNS = 256  # of a program; a thread accesses 16 bytes


class KernelError(Exception):
    """No compiled kernel fits, or its file is damaged; the text is one line."""


class Layout(msgspec.Struct, frozen=True):
    """How the work is cut: constants of the kernel.

    Attributes:
        rows: selected rows of a program.
        one_pass: each row is read once; otherwise once per scale.
        block: columns of a program.
        warps: of 32 threads, in a program.
    """

    rows: int
    one_pass: bool
    block: int
    warps: int

    def grid(self, batch: int, top_k: int, width: int) -> tuple[int, int, int]:
        """Programs along x, y and z."""
        return -(-top_k // self.rows), -(-width // self.block), batch


def layout_of(scales: Sequence[int], dtype: str) -> Layout:
    """The layout of a kernel for these scales; rows are a multiple of all of them where that is small enough."""
    multiple = math.lcm(*scales)
    one_pass = multiple <= MOST_ROWS
    rows = multiple * max(1, FEWEST_ROWS // multiple) if one_pass else BLOCK_ROWS
    itemsize = 4 if dtype == "float32" else 2
    return Layout(rows, one_pass, COLUMNS, COLUMNS * itemsize // 16 // 32)


class Entry(msgspec.Struct, frozen=True):
    """What the index says of a file.

    Attributes:
        entry: the kernel's name in the PTX.
        sm: architecture it was compiled for, e.g. 87.
        shared: bytes of dynamic shared memory.
        ptx_version: oldest that a translator must know, e.g. "8.0".
        triton: version that compiled it.
        sha256: of the file, hexadecimal.
    """

    file: str
    entry: str
    sm: int
    dtype: str
    scales: tuple[int, ...]
    layout: Layout
    shared: int
    ptx_version: str
    triton: str
    sha256: str


class Index(msgspec.Struct, frozen=True):
    """``index.json``: the kernels' arguments in order, and the files."""

    arguments: tuple[str, ...]
    kernels: tuple[Entry, ...]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: what the index says, and the PTX, ASCII."""

    facts: Entry
    ptx: bytes

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.facts.layout.warps * 32


def find(sm: tuple[int, int], dtype: str, scales: Sequence[int], folders: Sequence[Path] = ()) -> Kernel:
    """The kernel for a device of compute capability ``sm``: of the first folder that has one, the package's is last.

    Raises:
        KernelError: there is none, or a file is not the one that its index tells of.
    """
    number, names = sm[0] * 10 + sm[1], ",".join(map(str, scales))
    of_scales: list[Entry] = []
    for folder in (*folders, SHIPPED):
        entries = [entry for entry in read_index(folder).kernels if entry.scales == tuple(scales)]
        fitting = [entry for entry in entries if entry.dtype == dtype and entry.sm <= number]
        if fitting:
            return read(folder, max(fitting, key=lambda entry: entry.sm))
        of_scales += entries
    if not of_scales:
        raise KernelError(
            f"no compiled kernel has the scales {names}; python -m kernels.compile --scales {names} makes one"
        )
    known = sorted({entry.sm for entry in of_scales if entry.dtype == dtype})
    there = f"the oldest is for sm_{known[0]}" if known else f"none is of {dtype}"
    raise KernelError(f"no compiled kernel of the scales {names} runs {dtype} on sm_{number}; {there}")


def read_index(folder: Path) -> Index:
    """A folder's index.

    Raises:
        KernelError: it is not there or not an index.
    """
    try:
        return msgspec.json.decode((folder / INDEX).read_bytes(), type=Index)
    except (OSError, msgspec.MsgspecError) as error:
        raise KernelError(f"{folder / INDEX} is no index of kernels ({error}); kernels.compile writes one") from error


def read(folder: Path, entry: Entry) -> Kernel:
    """Load one kernel and check its hash."""
    path = folder / entry.file
    try:
        ptx = path.read_bytes()
    except OSError as error:
        raise KernelError(f"{path} cannot be read ({error.strerror}), but {INDEX} names it; compile again") from error
    sha256 = hashlib.sha256(ptx).hexdigest()
    if sha256 != entry.sha256:
        raise KernelError(f"{path} has sha256 {sha256[:12]}..., {INDEX} says {entry.sha256[:12]}...; compile again")
    return Kernel(entry, ptx)
