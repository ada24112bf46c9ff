"""The compiled kernels that an engine launches, kept beside it, so that it runs whatever package comes later.

A folder of ``kernels.ptx``'s form. Compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from calibration.write import written
from export.engine.files import prepared, put
from kernels.ptx import ARGUMENTS, INDEX, Index, Kernel

__all__ = ["put_kernels"]


def put_kernels(folder: Path, kernels: Sequence[Kernel]) -> None:
    """Replace what a folder holds; files are named by their contents and the index comes last, so it is never half.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    prepared(folder)
    entries = tuple(msgspec.structs.replace(kernel.facts, file=f"{kernel.facts.sha256[:16]}.ptx") for kernel in kernels)
    for entry, kernel in zip(entries, kernels, strict=True):
        put(folder / entry.file, kernel.ptx)
    index = msgspec.json.encode(Index(ARGUMENTS, entries), order="deterministic")
    put(folder / INDEX, msgspec.json.format(index, indent=1) + b"\n")
    kept = {entry.file for entry in entries}
    with written(folder):
        for path in folder.glob("*.ptx"):
            if path.name not in kept:
                path.unlink()
