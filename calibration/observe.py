"""What a calibration run keeps of one activation: a histogram, extremes per channel, and a sample of rows.

Its size depends on the tensor's width alone, not on how much is shown to it, and what it keeps not on the order of
other tensors: every observer draws from a generator seeded by its name.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from calibration.histogram import Histogram

__all__ = ["Observer"]

Floats = NDArray[np.float32]

SAMPLE = 256  # rows; enough to tell methods apart by the error of the layer's output
LOUD = 32  # rows


class Observer:
    """Statistics of an activation (..., K).

    Attributes:
        histogram: of magnitudes.
        channels: (K,) f32, largest magnitude of every channel.
        rows: number of rows seen.
    """

    def __init__(self, name: str, sample: int = SAMPLE) -> None:
        self.histogram = Histogram()
        self.channels: Floats = np.zeros(0, np.float32)
        self.rows = 0
        self._random = np.random.default_rng(zlib.crc32(name.encode()))
        self._even, self._loud = Rows(sample), Rows(LOUD)

    def add(self, values: NDArray[np.floating]) -> None:
        """Take another piece (..., K) into account."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return
        self.histogram.add(rows)
        largest = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float32)
        self.channels = np.maximum(self.channels, largest) if self.channels.size else largest
        self.rows += len(rows)
        self._even.add(rows, self._random.random(len(rows)))
        self._loud.add(rows, -np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float64))

    @property
    def sample(self) -> Floats:
        """Up to ``sample`` rows (R, K), drawn evenly from all that were seen."""
        return self._even.rows

    @property
    def loud(self) -> Floats:
        """The rows (R, K) of the largest magnitudes: few tokens, as an LLM's first, may be far beyond all others."""
        return self._loud.rows


class Rows:
    """The rows with the smallest keys of all that were seen; of equal keys the first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys = np.zeros(0)  # ascending
        self.rows: Floats = np.zeros((0, 0), np.float32)

    def add(self, rows: NDArray[np.floating], keys: NDArray[np.float64]) -> None:
        """Take rows (R, K) with keys (R,) into account."""
        limit = self.keys[-1] if len(self.keys) == self.size else np.inf
        chosen = np.flatnonzero(keys < limit)
        if not chosen.size:
            return
        chosen = chosen[np.argsort(keys[chosen], kind="stable")[: self.size]]
        kept = rows[chosen].astype(np.float32)
        merged = np.concatenate([self.keys, keys[chosen]])
        order = np.argsort(merged, kind="stable")[: self.size]
        self.rows = np.concatenate([self.rows, kept])[order] if self.rows.size else kept[order]
        self.keys = merged[order]
