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
        self._size = sample
        self._keys = np.zeros(0)  # one per sampled row; the smallest of all keys drawn
        self._sample: Floats = np.zeros((0, 0), np.float32)

    def add(self, values: NDArray[np.floating]) -> None:
        """Take another piece (..., K) into account."""
        rows = values.reshape(-1, values.shape[-1])
        if not len(rows):
            return
        self.histogram.add(rows)
        largest = np.maximum(rows.max(axis=0), -rows.min(axis=0)).astype(np.float32)
        self.channels = np.maximum(self.channels, largest) if self.channels.size else largest
        self.rows += len(rows)
        self._draw(rows)

    def _draw(self, rows: NDArray[np.floating]) -> None:
        """Uniform sampling without replacement: a row stays while its random key is among the smallest."""
        keys = self._random.random(len(rows))
        limit = self._keys[-1] if len(self._keys) == self._size else 1.0
        chosen = np.flatnonzero(keys < limit)
        if not chosen.size:
            return
        chosen = chosen[np.argsort(keys[chosen], kind="stable")[: self._size]]
        kept = rows[chosen].astype(np.float32)
        merged = np.concatenate([self._keys, keys[chosen]])
        order = np.argsort(merged, kind="stable")[: self._size]
        self._sample = np.concatenate([self._sample, kept])[order] if self._sample.size else kept[order]
        self._keys = merged[order]

    @property
    def sample(self) -> Floats:
        """Up to ``sample`` rows (R, K), drawn evenly from all that were seen."""
        return self._sample
