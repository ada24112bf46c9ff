"""Which threshold and which smoothing an activation gets: those with the smallest error of what its layers make of it.

The error is || quantised(x) quantised(W) - x W || / || x W ||, over all layers that read x together, on rows drawn
evenly from all, and on the loudest: to clip them looks cheap on average and ruins the few tokens they belong to. The
larger of the two counts. Of the smoothings the best is found with the plainest threshold; then every threshold is tried
with it and without any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from calibration.blocks import check_weight
from calibration.histogram import Histogram
from calibration.insert import LEVELS, columns_quantized
from calibration.linears import Linear
from calibration.observe import Observer
from calibration.scales import LEAST_SCALE, TensorScale
from calibration.smooth import ALPHAS, smooth_exponents
from calibration.thresholds import threshold, thresholds

__all__ = ["CHOICES", "Choice", "chosen_scale", "judged", "some_columns"]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]
Choice = Literal["auto", "minmax", "percentile", "entropy", "mse"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

COLUMNS = 4096  # of a weight, evenly spread, on which errors are measured: an LLM's head has 150,000


def chosen_scale(
    linears: Sequence[Linear], observer: Observer, method: Choice, *, smooth: bool, least: float = LEAST_SCALE
) -> TensorScale:
    """The scale of the activation that ``linears`` read.

    Args:
        linears: layers that share the activation.
        observer: what was seen of it.
        method: one of ``CHOICES``; "auto" tries all.
        smooth: whether factors can be folded into what makes the activation.
        least: smallest scale that the stage holds.

    Raises:
        CalibrationError: a weight is not finite.
    """
    weights = [some_columns(linear) for linear in linears]
    trial = Trial(observer, weights, least)
    options = [np.zeros(len(observer.channels), np.int8)]
    if smooth:
        tried = [smooth_exponents(observer.channels, weights, alpha) for alpha in ALPHAS]
        options.append(min(tried, key=lambda option: trial.error(option, trial.largest(option))))
    candidates = [candidate for option in options for candidate in trial.candidates(option, method)]
    best = min(candidates, key=lambda candidate: candidate.error)  # the plainest of those that err alike
    return TensorScale(
        threshold=best.threshold,
        method=best.method,
        largest=observer.histogram.largest,
        error=best.error,
        layers=tuple(linear.name for linear in linears),
        smooth=tuple(best.exponents.tolist()) if best.exponents.any() else (),
    )


def judged(given: TensorScale, linears: Sequence[Linear], observer: Observer) -> TensorScale:
    """An entry of a scale table, with the layers that it is for and what was seen and found of it here."""
    trial = Trial(observer, [some_columns(linear) for linear in linears])
    exponents = np.array(given.smooth or np.zeros(len(observer.channels)), np.int8)
    with np.errstate(over="ignore"):  # beside a tiny threshold everything is clipped
        error = trial.error(exponents, given.threshold)
    return msgspec.structs.replace(
        given, largest=observer.histogram.largest, error=error, layers=tuple(linear.name for linear in linears)
    )


def some_columns(linear: Linear) -> Floats:
    """At most ``COLUMNS`` columns (K, n) of a layer's weight (K, N)."""
    weight = linear.weight()
    check_weight(weight, block=1, bits=8)
    step = -(-weight.shape[1] // COLUMNS)
    return np.ascontiguousarray(weight[:, ::step])


@dataclass(frozen=True)
class Candidate:
    """A smoothing and a threshold, and the relative error of the layers' outputs with them."""

    exponents: Exponents
    method: str
    threshold: float
    error: float


def norm(values: Floats) -> float:
    """The Frobenius norm; squares of float32 leave its range."""
    return float(np.linalg.norm(values.astype(np.float64)))


class Trial:
    """Errors of candidate scales for one activation."""

    def __init__(self, observer: Observer, weights: Sequence[Floats], least: float = LEAST_SCALE) -> None:
        self.observer = observer
        self.least = least
        self.weight = np.concatenate(weights, axis=1)  # (K, n): errors are those of all layers together
        self.rows = (observer.sample, observer.loud)  # (R, K) each
        self.wanted = [rows @ self.weight for rows in self.rows]
        self.quantized: dict[bytes, Floats] = {}

    def candidates(self, exponents: Exponents, method: Choice) -> list[Candidate]:
        """Every method's threshold behind one smoothing."""
        found = self.thresholds(exponents, method)
        return [Candidate(exponents, name, value, self.error(exponents, value)) for name, value in found.items()]

    def largest(self, exponents: Exponents) -> float:
        """Largest magnitude of the smoothed activation, over all that was seen."""
        return float(np.ldexp(self.observer.channels, -exponents.astype(np.int32)).max())

    def thresholds(self, exponents: Exponents, method: Choice) -> dict[str, float]:
        """Candidates by method; of a smoothed activation the histogram is that of the sampled rows."""
        histogram = self.observer.histogram
        if exponents.any():
            histogram = Histogram()
            histogram.add(np.ldexp(self.observer.sample, -exponents.astype(np.int32)))
        found = dict(thresholds(histogram)) if method == "auto" else {str(method): threshold(histogram, method)}
        if "minmax" in found:
            found["minmax"] = self.largest(exponents)
        return {name: max(value, self.least * LEVELS) for name, value in found.items()}

    def error(self, exponents: Exponents, limit: float) -> float:
        """Relative error of the layers' outputs, on the evenly drawn rows or on the loudest, whichever is larger."""
        errors = [
            norm(self.narrowed(rows, exponents, limit) @ self.narrow(exponents) - wanted) / (norm(wanted) or 1.0)
            for rows, wanted in zip(self.rows, self.wanted, strict=True)
        ]
        return max(errors)

    def narrowed(self, rows: Floats, exponents: Exponents, limit: float) -> Floats:
        """Smoothed rows after a round trip through 8 bits."""
        scale = np.float32(limit / LEVELS)
        found: Floats = np.rint(np.ldexp(rows, -exponents.astype(np.int32)) / scale).clip(-LEVELS - 1, LEVELS) * scale
        return found

    def narrow(self, exponents: Exponents) -> Floats:
        """The smoothed weight after a round trip through 8 bits."""
        key = exponents.tobytes()
        if key not in self.quantized:
            self.quantized.clear()
            values, scales = columns_quantized(np.ldexp(self.weight, exponents.astype(np.int32)[:, None]))
            self.quantized[key] = values * scales
        return self.quantized[key]
