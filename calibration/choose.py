"""Which threshold and which smoothing an activation gets: those with the smallest error of what its layers make of it.

The error is measured on sampled rows: || quantised(x) quantised(W) - x W || / || x W ||, over all layers that read x
together. The smoothing is chosen first, with the plainest threshold, then the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calibration.histogram import Histogram
from calibration.insert import LEVELS, columns_quantized
from calibration.linears import Linear
from calibration.observe import Observer
from calibration.scales import TensorScale
from calibration.smooth import ALPHAS, smooth_exponents
from calibration.thresholds import METHODS, threshold, thresholds

__all__ = ["CHOICES", "Choice", "chosen_scale"]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]
Choice = Literal["auto", "minmax", "percentile", "entropy", "mse"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

COLUMNS = 4096  # of a weight, evenly spread, on which errors are measured: an LLM's head has 150,000


def chosen_scale(linears: Sequence[Linear], observer: Observer, method: Choice, *, smooth: bool) -> TensorScale:
    """The scale of the activation that ``linears`` read.

    Args:
        linears: layers that share the activation.
        observer: what was seen of it.
        method: one of ``CHOICES``; "auto" tries all.
        smooth: whether factors can be folded into what makes the activation.
    """
    weights = [some_columns(linear.weight()) for linear in linears]
    trial = Trial(observer, weights)
    exponents = np.zeros(len(observer.channels), np.int8)
    if smooth:
        tried = [exponents, *(smooth_exponents(observer.channels, weights, alpha) for alpha in ALPHAS)]
        exponents = min(tried, key=lambda option: trial.error(option, trial.largest(option)))
    candidates = trial.thresholds(exponents, method)
    errors = {name: trial.error(exponents, value) for name, value in candidates.items()}
    best = min(errors, key=lambda name: (errors[name], METHODS.index(name)))
    return TensorScale(
        threshold=candidates[best],
        method=best,
        largest=observer.histogram.largest,
        error=errors[best],
        layers=tuple(linear.name for linear in linears),
        smooth=tuple(exponents.tolist()) if exponents.any() else (),
    )


def some_columns(weight: Floats) -> Floats:
    """At most ``COLUMNS`` columns (K, n) of a weight (K, N)."""
    step = -(-weight.shape[1] // COLUMNS)
    return np.ascontiguousarray(weight[:, ::step])


class Trial:
    """Errors of candidate scales for one activation."""

    def __init__(self, observer: Observer, weights: Sequence[Floats]) -> None:
        self.observer = observer
        self.rows = observer.sample  # (R, K)
        self.weight = np.concatenate(weights, axis=1)  # (K, n): errors are those of all layers together
        self.wanted = self.rows @ self.weight
        self.norm = float(np.linalg.norm(self.wanted)) or 1.0
        self.quantized: dict[bytes, Floats] = {}

    def largest(self, exponents: Exponents) -> float:
        """Largest magnitude of the smoothed activation, over all that was seen."""
        return float(np.ldexp(self.observer.channels, -exponents.astype(np.int32)).max())

    def thresholds(self, exponents: Exponents, method: Choice) -> dict[str, float]:
        """Candidates by method; of a smoothed activation the histogram is that of the sampled rows."""
        histogram = self.observer.histogram
        if exponents.any():
            histogram = Histogram()
            histogram.add(np.ldexp(self.rows, -exponents.astype(np.int32)))
        found = dict(thresholds(histogram)) if method == "auto" else {str(method): threshold(histogram, method)}
        if "minmax" in found:
            found["minmax"] = self.largest(exponents)
        return found

    def error(self, exponents: Exponents, limit: float) -> float:
        """Relative error of the layers' outputs."""
        shift = exponents.astype(np.int32)
        scale = np.float32(limit / LEVELS)
        rows = np.rint(np.ldexp(self.rows, -shift) / scale).clip(-LEVELS - 1, LEVELS) * scale
        return float(np.linalg.norm(rows @ self.narrow(exponents) - self.wanted)) / self.norm

    def narrow(self, exponents: Exponents) -> Floats:
        """The smoothed weight after a round trip through 8 bits."""
        key = exponents.tobytes()
        if key not in self.quantized:
            self.quantized.clear()
            values, scales = columns_quantized(np.ldexp(self.weight, exponents.astype(np.int32)[:, None]))
            self.quantized[key] = values * scales
        return self.quantized[key]
