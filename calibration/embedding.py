"""The token embedding table in 8 bits: a quarter of float32's size, a scale for every row.

Reads and writes it in pieces. The runtime multiplies the rows it looks up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from calibration.insert import LEVELS
from runtime.embedding import EmbeddingTable
from runtime.errors import OutputError

__all__ = ["write_narrow_embedding"]

PIECE = 4096  # rows


def write_narrow_embedding(source: Path, target: Path) -> None:
    """Write the table at ``source`` (V, D) as int8 with a scale (V,), each row's largest magnitude 127."""
    table = EmbeddingTable.open(source)
    values = np.empty((table.vocabulary, table.width), np.int8)
    scales = np.empty(table.vocabulary, np.float32)
    for start in range(0, table.vocabulary, PIECE):
        piece = slice(start, min(start + PIECE, table.vocabulary))
        rows = table.rows(np.arange(piece.start, piece.stop))
        largest = np.abs(rows).max(axis=1) / np.float32(LEVELS)
        scales[piece] = np.where(largest > np.finfo(np.float32).tiny, largest, np.float32(1))
        values[piece] = np.rint(rows / scales[piece, None]).clip(-LEVELS, LEVELS)
    try:
        save_file({"embedding": values, "scale": scales}, target)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    target.chmod(0o644)
