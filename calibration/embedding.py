"""The token embedding table in 8 bits: a quarter of float32's size, a scale for every row.

Reads the table in pieces and holds the narrow one whole. The runtime multiplies the rows it looks up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from calibration.insert import LEVELS
from runtime.embedding import EmbeddingTable
from runtime.errors import CalibrationError, OutputError

__all__ = ["write_narrow_embedding"]

PIECE = 4096  # rows


def write_narrow_embedding(source: Path, target: Path) -> float:
    """Write the table at ``source`` (V, D) as int8 with a scale (V,), each row's largest magnitude 127.

    Returns:
        The smallest cosine of a row with what it was; rows of zeros stay what they are.

    Raises:
        CalibrationError: a row holds NaN or infinite values.
        OutputError: the file cannot be written.
    """
    table = EmbeddingTable.open(source)
    values = np.empty((table.vocabulary, table.width), np.int8)
    scales = np.empty(table.vocabulary, np.float32)
    cosine = 1.0
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
        cosine = min(cosine, smallest_cosine(rows, values[piece]))
    try:
        save_file({"embedding": values, "scale": scales}, target)
        target.chmod(0o644)  # safetensors leaves it to its owner
    except (SafetensorError, OSError) as error:
        raise OutputError(f"cannot write {target}: {error}; check the folder and the disk") from error
    return cosine


def smallest_cosine(rows: NDArray[np.float32], narrow: NDArray[np.int8]) -> float:
    """Of rows (R, D) with their narrow forms, whatever their scales; 1 for rows of zeros."""
    first, second = rows.astype(np.float64), narrow.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.where(norms > 0, (first * second).sum(axis=1) / np.where(norms > 0, norms, 1), 1).min())
