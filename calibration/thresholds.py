"""A histogram of magnitudes to the threshold at which symmetric int8 quantisation clips.

With threshold t the scale is t / 127: values are divided by it, rounded to nearest even and kept within -127 to 127.
(An engine keeps -128 too, one step more on one side.)
Thresholds are found in units of a bin, so a tensor times a power of two has exactly that times the threshold.

Thresholds are no finer than the bins: beside an outlier nearly all values share the first few. "percentile" is at least
one bin and "entropy" at least 128, a sixteenth of the range of 2048 bins; give the histogram more of them where that
matters. "mse" is not held up by it.

Does not refuse constant zeros, NaN or infinity: whoever gathered the histogram does. Does not quantise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.histogram import Histogram
from runtime.errors import OptionError

__all__ = ["METHODS", "PERCENTILE", "mean_squared_error", "threshold", "thresholds"]

METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = 99.99

_LEVELS = 127  # positive ones of symmetric int8
_ENTROPY_LEVELS = 128
_ENTROPY_CANDIDATES = 256  # about so many are tried
_UNSEEN = 1e-4  # counts given to a bin that only clipped values fill
_MSE_CANDIDATES = 192
_MSE_REFINED = 25  # candidates of each finer search, between the neighbours of the best so far
_MSE_REFINEMENTS = 2

Floats = NDArray[np.float64]


def thresholds(histogram: Histogram) -> dict[str, float]:
    """The threshold of every method."""
    return {method: threshold(histogram, method) for method in METHODS}


def threshold(histogram: Histogram, method: str, *, percentile: float = PERCENTILE) -> float:
    """Where to clip: above 0, at most the largest value; 0 where nothing but zeros was seen.

    Args:
        histogram: of the values that will be quantised.
        method: "minmax" clips nothing; "percentile" clips what lies above a percentile of all values; "entropy" keeps
            the Kullback-Leibler divergence least; "mse" keeps the mean squared error of rounding and clipping least.
        percentile: above 0, at most 100; no other method reads it.
    """
    if method not in METHODS:
        raise OptionError(f"calibration method is {method!r}; expected one of {', '.join(METHODS)}")
    if not 0.0 < percentile <= 100.0:
        raise OptionError(f"percentile is {percentile:g}, expected above 0 and at most 100; try {PERCENTILE}")
    if not histogram.largest:
        return 0.0
    bins = _Bins.of(histogram)
    choose: dict[str, Callable[[], float]] = {
        "minmax": lambda: bins.largest,
        "percentile": lambda: _percentile(histogram, percentile),
        "entropy": lambda: _least_divergence(bins),
        "mse": lambda: _least_error(bins),
    }
    return min(choose[method]() * histogram.width, histogram.largest)


def mean_squared_error(histogram: Histogram, threshold: float) -> float:
    """What quantisation with ``threshold`` > 0 costs a value on average, by ``_Bins.error``."""
    if not histogram.largest:
        return 0.0
    error = _Bins.of(histogram).error(threshold / histogram.width)
    return error * histogram.width**2 / histogram.total


@dataclass(frozen=True)
class _Bins:
    """A histogram without its exact zeros, which every scale represents; the unit of length is a bin.

    Attributes:
        counts: (n,) f64 up to the bin of the largest value.
        largest: value seen, n - 1 < largest <= n.
    """

    counts: Floats
    largest: float

    @staticmethod
    def of(histogram: Histogram) -> _Bins:
        """The same values in units of a bin."""
        largest = histogram.largest / histogram.width
        counts = histogram.counts[: math.ceil(largest)].astype(np.float64)
        counts[0] -= histogram.zeros
        return _Bins(counts, largest)

    def error(self, clip: float) -> float:
        """Sum of squared errors when clipped at ``clip``, the values of a bin taken as spread evenly over it.

        The last bin ends at the largest value. The squared distance to the nearest level is integrated from 0 to both
        edges of a bin; as in Banner et al. 2019 (arXiv:1810.05723), with the histogram in place of a density.
        """
        filled = np.flatnonzero(self.counts)
        low, high = filled.astype(np.float64), np.minimum(filled + 1.0, self.largest)
        spent = _squared_distance(high, clip) - _squared_distance(low, clip)
        return float((self.counts[filled] / (high - low)) @ spent)


def _squared_distance(reach: Floats, clip: float) -> Floats:
    """Integral from 0 to ``reach`` (n,) f64 of the squared distance to the nearest level; ``clip`` is the last level.

    Half a step on both sides of a level makes step**3 / 12; what is left to the nearest level d makes d**3 / 3.
    """
    step = clip / _LEVELS
    level = np.minimum(np.rint(reach / step), _LEVELS)
    distances: Floats = level * (step**3 / 12) + (reach - level * step) ** 3 / 3
    return distances


def _percentile(histogram: Histogram, percentile: float) -> float:
    """The lowest bin edge that ``percentile`` per cent of all values, zeros too, do not exceed, in bins."""
    reached = histogram.counts.cumsum()
    return float(reached.searchsorted(percentile * histogram.total / 100) + 1)


def _least_error(bins: _Bins) -> float:
    """Threshold of the least squared error, in bins: the best of a geometric grid, then of finer ones around it."""
    candidates = np.geomspace(min(1.0, bins.largest), bins.largest, _MSE_CANDIDATES)
    for refinement in range(_MSE_REFINEMENTS + 1):
        best = int(np.argmin([bins.error(clip) for clip in candidates]))
        if refinement < _MSE_REFINEMENTS:
            low, high = candidates[max(best - 1, 0)], candidates[min(best + 1, candidates.size - 1)]
            candidates = np.linspace(low, high, _MSE_REFINED)
    return float(candidates[best])


def _least_divergence(bins: _Bins) -> float:
    """Threshold of the least Kullback-Leibler divergence, in bins (Migacz, "8-bit Inference with TensorRT", GTC 2017).

    Exact zeros are left out, as calibrators commonly do: padding and ReLU pile them up, and they cost nothing.
    """
    size = bins.counts.size
    first = min(_ENTROPY_LEVELS, size)
    kept = [*range(first, size, max(1, size // _ENTROPY_CANDIDATES)), size]
    return float(kept[int(np.argmin([_divergence(bins.counts, bins_kept) for bins_kept in kept]))])


def _divergence(counts: Floats, kept: int) -> float:
    """KL(P || Q), in nats, when all but the first ``kept`` bins of ``counts`` (n,) f64 are clipped.

    P is the kept bins with everything clipped in the last of them. Q is the kept bins without what is clipped, merged
    to 128 levels, each shared evenly by those of its bins that P fills. A last level that only clipped values fill
    would make the divergence infinite and forbid to clip an outlier beyond a gap; it gets 1e-4 of a count, as empty
    bins do in ONNX Runtime's calibrator.
    """
    inside = counts[:kept]
    seen = float(inside.sum())
    if not seen:
        return math.inf
    reference = inside.copy()
    reference[-1] += counts[kept:].sum()
    levels = min(_ENTROPY_LEVELS, kept)
    level = np.arange(kept) * levels // kept  # of every bin
    filled = np.flatnonzero(reference)
    sums = np.bincount(level, inside, levels)
    shares = np.maximum(sums / np.maximum(np.bincount(level[filled], minlength=levels), 1), _UNSEEN)
    p = reference[filled] / reference.sum()
    q = shares[level[filled]] / seen
    return float(p @ np.log(p / q))
