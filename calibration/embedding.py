"""The token embedding table in 8 bits: a quarter of float32's size, a scale for every row.

Reads the table in pieces and holds the narrow one whole. The runtime multiplies the rows it looks up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from calibration.insert import LEVELS
from runtime.embedding import EmbeddingTable
from runtime.errors import CalibrationError, OutputError

__all__ = ["write_narrow_embedding"]

PIECE = 4096  # rows


def write_narrow_embedding(source: Path, target: Path) -> None:
    """Write the table at ``source`` (V, D) as int8 with a scale (V,), each row's largest magnitude 127.

    Raises:
        CalibrationError: a row holds NaN or infinite values.
        OutputError: the file cannot be written.
    """
    table = EmbeddingTable.open(source)
    values = np.empty((table.vocabulary, table.width), np.int8)
    scales = np.empty(table.vocabulary, np.float32)
    for start in range(0, table.vocabulary, PIECE):
        piece = slice(start, min(start + PIECE, table.vocabulary))
        rows = table.rows(np.arange(piece.start, piece.stop))
        if not np.isfinite(rows).all():
            row = piece.start + int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise CalibrationError(
                f"row {row} of {source.name} holds NaN or infinite values, expected finite ones; export the bundle "
                "again, or leave out --embedding int8"
            )
        largest = np.abs(rows).max(axis=1) / np.float32(LEVELS)
        scales[piece] = np.where(largest > np.finfo(np.float32).tiny, largest, np.float32(1))
        values[piece] = np.rint(rows / scales[piece, None]).clip(-LEVELS, LEVELS)
    try:
        save_file({"embedding": values, "scale": scales}, target)
        target.chmod(0o644)  # safetensors leaves it to its owner
    except (SafetensorError, OSError) as error:
        raise OutputError(f"cannot write {target}: {error}") from error
