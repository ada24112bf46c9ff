"""Which 4-bit weights a layer gets: plain rounding, fitted ranges or GPTQ, whichever errs least on unseen rows.

Three quarters of the sampled rows fit the candidates, the rest judge them: || x W_hat - x W || / || x W ||. The winner
is fitted again on all rows. Layers whose activation can be smoothed try that too, with AWQ's factors rounded to powers
of two (``smooth`` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.awq import awq_scales
from calibration.blocks import Blocks, clipped, output_error, round_to_nearest
from calibration.gptq import gptq
from calibration.linears import Linear
from calibration.observe import Observer
from calibration.scales import TensorScale
from calibration.smooth import MOST

__all__ = ["block_of", "chosen_blocks"]

Floats = NDArray[np.float32]
Exponents = NDArray[np.int8]
Fit = Callable[[Floats, int, Floats, int], Blocks]  # weight (K, N), block, rows (R, K), bits

SMALLEST_BLOCK = 16  # ONNX Runtime's 4-bit kernel takes no smaller one


def fitted(weight: Floats, block: int, rows: Floats, bits: int) -> Blocks:
    """Ranges fitted to what passes through."""
    return clipped(weight, block, np.square(rows, dtype=np.float64).mean(axis=0), bits)


def rounded(weight: Floats, block: int, rows: Floats, bits: int) -> Blocks:
    """Plain rounding."""
    return round_to_nearest(weight, block, bits)


FITS: dict[str, Fit] = {"gptq": gptq, "fitted": fitted, "rounded": rounded}


def block_of(width: int, most: int) -> int:
    """The largest block of at most ``most`` rows that divides K, or 0."""
    block = most
    while block >= SMALLEST_BLOCK and width % block:
        block //= 2
    return block if block >= SMALLEST_BLOCK else 0


def chosen_blocks(
    linears: Sequence[Linear], observer: Observer, most: int, *, smooth: bool
) -> tuple[TensorScale, dict[str, Blocks]]:
    """Weights in blocks for the layers that read one activation, and the entry of the scale table.

    Args:
        linears: layers that share the activation.
        observer: what was seen of it.
        most: rows that share a scale, at most; a layer that no block divides is left out.
        smooth: whether factors can be folded into what makes the activation.
    """
    rows, width = observer.sample, linears[0].shape[0]
    block = block_of(width, most)
    if not block:
        return entry(linears, observer, "none", 0.0, ()), {}
    cut = max(1, len(rows) * 3 // 4)
    known, unseen = rows[:cut], rows[cut:] if cut < len(rows) else rows
    plain = np.zeros(width, np.int8)
    options = [plain]
    if smooth:
        factors = awq_scales([linear.weight() for linear in linears], known, block)
        options.append(np.rint(np.log2(factors)).clip(-MOST, MOST).astype(np.int8))
    best: tuple[float, Exponents, dict[str, str]] | None = None
    for exponents in options:
        if best is not None and not exponents.any():
            continue
        methods, errors = {}, []
        for linear in linears:
            methods[linear.name], error = judged(linear, exponents, block, known, unseen)
            errors.append(error)
        if best is None or np.mean(errors) < best[0]:
            best = float(np.mean(errors)), exponents, methods
    assert best is not None
    error, exponents, methods = best
    blocks = {linear.name: fit(linear, exponents, block, rows, methods[linear.name]) for linear in linears}
    method = "/".join(dict.fromkeys(methods.values()))
    return entry(linears, observer, method, error, exponents), blocks


def judged(linear: Linear, exponents: Exponents, block: int, known: Floats, unseen: Floats) -> tuple[str, float]:
    """The method that errs least on rows it has not seen, and its error."""
    weight, rows = smoothed_pair(linear.weight(), unseen, exponents)
    errors = {
        method: output_error(weight, fit(linear, exponents, block, known, method).dense(), rows) for method in FITS
    }
    method = min(errors, key=lambda name: errors[name])
    return method, errors[method]


def fit(linear: Linear, exponents: Exponents, block: int, rows: Floats, method: str) -> Blocks:
    """One layer's blocks by one method."""
    weight, smooth_rows = smoothed_pair(linear.weight(), rows, exponents)
    return FITS[method](weight, block, smooth_rows, bits_of(linear))


def bits_of(linear: Linear) -> int:
    """4, or 8 for an odd number of columns, which TensorRT's parser does not take in 4 bits."""
    return 8 if linear.shape[1] % 2 else 4


def smoothed_pair(weight: Floats, rows: Floats, exponents: Exponents) -> tuple[Floats, Floats]:
    """Weight (K, N) times 2^exponents, rows (R, K) divided by it."""
    shift = exponents.astype(np.int32)
    return np.ldexp(weight, shift[:, None]), np.ldexp(rows, -shift)


def entry(
    linears: Sequence[Linear], observer: Observer, method: str, error: float, exponents: Exponents | tuple[()]
) -> TensorScale:
    """The scale table's line; the threshold is what would clip nothing, and is not used."""
    smooth = tuple(np.asarray(exponents).tolist()) if np.any(exponents) else ()
    return TensorScale(
        threshold=observer.histogram.largest,
        method=method,
        largest=observer.histogram.largest,
        error=error,
        layers=tuple(linear.name for linear in linears),
        smooth=smooth,
    )
