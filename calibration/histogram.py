"""How the magnitudes of an activation are distributed, gathered over any number of batches in fixed memory.

The range is a power of two and doubles, pairs of bins becoming one, when a larger value comes. Widths are therefore
exact, and what was added determines the counts: neither the order nor the pieces it came in do.

Does not refuse NaN and infinity: they are counted and left out. Does not choose where to clip: ``thresholds`` does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram"]

BINS = 2048

_PIECE = 2**18  # values looked at together: 2 MiB as f64, which caches hold


class Histogram:
    """Counts of |x| in bins of equal width; bin k holds k * width < |x| <= (k + 1) * width, and bin 0 also zeros.

    Attributes:
        counts: (bins,) i64.
        width: of a bin, a power of two; 0 while nothing but zeros was seen.
        largest: the largest |x|, exact.
        total: values seen that are finite, ``zeros`` among them.
        not_finite: NaN and infinite values seen; they are in no bin.
    """

    def __init__(self, bins: int = BINS) -> None:
        assert bins > 1 and bins & (bins - 1) == 0, "halving a power of two into pairs leaves no bin over"
        self.counts: NDArray[np.int64] = np.zeros(bins, np.int64)
        self.width = 0.0
        self.largest = 0.0
        self.total = 0
        self.zeros = 0
        self.not_finite = 0

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Count ``values`` of any shape, f32, f16 or bf16."""
        flat = values.reshape(-1)
        for start in range(0, flat.size, _PIECE):
            self._add_magnitudes(np.abs(flat[start : start + _PIECE].astype(np.float64)))

    def _add_magnitudes(self, values: NDArray[np.float64]) -> None:
        """Count one piece (n,) f64, n > 0, which is overwritten."""
        largest = float(values.max())
        if not math.isfinite(largest):  # NaN is a maximum too
            finite = values[np.isfinite(values)]
            self.not_finite += values.size - finite.size
            values, largest = finite, float(finite.max(initial=0.0))
        self.total += values.size
        if largest > self.largest:
            self.largest = largest
            self._widen(_bin_width(largest, self.counts.size))
        if self.width:
            np.multiply(values, 1.0 / self.width, out=values)
        np.ceil(values, out=values)
        found = np.bincount(values.astype(np.int64), minlength=self.counts.size + 1)  # [0] are zeros, [k + 1] is bin k
        self.zeros += int(found[0])
        self.counts[0] += found[0]
        self.counts += found[1:]

    def _widen(self, width: float) -> None:
        """Make bins ``width`` wide, at least as wide as they are."""
        if 0.0 < self.width < width:
            merged = int(min(width / self.width, self.counts.size))
            folded = self.counts.reshape(-1, merged).sum(1)
            self.counts = np.zeros_like(self.counts)
            self.counts[: folded.size] = folded
        self.width = width


def _bin_width(largest: float, bins: int) -> float:
    """Width of ``bins`` bins that reach the smallest power of two not below ``largest`` > 0."""
    fraction, exponent = math.frexp(largest)  # fraction in [0.5, 1)
    if fraction == 0.5:
        exponent -= 1
    return math.ldexp(1.0, exponent) / bins
