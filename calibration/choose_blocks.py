"""Which 4-bit weights a layer gets: plain rounding, fitted ranges or GPTQ, whichever errs least on unseen rows.

Three quarters of the sampled rows fit the candidates, the rest judge them: || x W_hat - x W || / || x W ||, on some
columns of a wide weight. The winner is fitted again on all rows and columns. Layers whose activation can be smoothed
try that too, with AWQ's factors rounded to powers of two (``smooth`` says why).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from calibration.awq import awq_scales
from calibration.blocks import Blocks, clipped, output_error, round_to_nearest
from calibration.choose import some_columns
from calibration.gptq import gptq
from calibration.linears import Linear
from calibration.observe import Observer
from calibration.scales import TensorScale
from calibration.smooth import MOST

__all__ = ["ROUNDINGS", "Rounding", "block_of", "chosen_blocks"]

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
Rounding = Literal["auto", "gptq", "fitted", "rounded"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def block_of(width: int, most: int) -> int:
    """The largest block that divides K, of ``most`` rows, half of that, a quarter and so on; 0 where none does."""
    block = most
    while block >= SMALLEST_BLOCK and width % block:
        block //= 2
    return block if block >= SMALLEST_BLOCK else 0


def chosen_blocks(
    linears: Sequence[Linear], observer: Observer, most: int, rounding: Rounding = "auto", *, smooth: bool
) -> tuple[TensorScale, dict[str, Blocks]]:
    """Weights in blocks for the layers that read one activation, and the entry of the scale table.

    Args:
        linears: layers that share the activation.
        observer: what was seen of it.
        most: rows that share a scale, at most; a layer that no block divides is left out.
        rounding: one of ``ROUNDINGS``; "auto" tries all, "rounded" is plain rounding without smoothing.
        smooth: whether factors can be folded into what makes the activation.
    """
    rows, width = observer.sample, linears[0].shape[0]
    block = block_of(width, most)
    if not block:
        return entry(linears, observer, "none", 0.0, np.zeros(width, np.int8)), {}
    cut = max(1, len(rows) * 3 // 4)
    known, unseen = rows[:cut], rows[cut:] if cut < len(rows) else rows
    layers = [(some_columns(linear), bits_of(linear)) for linear in linears]
    options = [np.zeros(width, np.int8)]
    if smooth and rounding != "rounded":
        factors = awq_scales([weight for weight, _ in layers], known, block)
        options.append(np.rint(np.log2(factors)).clip(-MOST, MOST).astype(np.int8))
    methods = tuple(FITS) if rounding == "auto" else (rounding,)
    tried = [Trial.of(layers, option, block, known, unseen, methods) for option in options]
    best = min(tried, key=lambda trial: trial.error)  # none, where smoothing does not help
    blocks = {
        linear.name: fit(linear.weight(), best.exponents, block, rows, method, bits_of(linear))
        for linear, method in zip(linears, best.methods, strict=True)
    }
    return entry(linears, observer, "/".join(dict.fromkeys(best.methods)), best.error, best.exponents), blocks


@dataclass(frozen=True)
class Trial:
    """A smoothing, the best method of every layer behind it, and their mean relative error on unseen rows."""

    exponents: Exponents
    methods: tuple[str, ...]
    error: float

    @staticmethod
    def of(
        layers: Sequence[tuple[Floats, int]],
        exponents: Exponents,
        block: int,
        known: Floats,
        unseen: Floats,
        methods: Sequence[str],
    ) -> Trial:
        """Judge every layer, a weight (K, N) and its bits."""
        found = [judged(weight, exponents, block, known, unseen, bits, methods) for weight, bits in layers]
        return Trial(exponents, tuple(method for method, _ in found), float(np.mean([error for _, error in found])))


def judged(
    weight: Floats,
    exponents: Exponents,
    block: int,
    known: Floats,
    unseen: Floats,
    bits: int,
    methods: Sequence[str],
) -> tuple[str, float]:
    """The method that errs least on rows it has not seen, and its error."""
    wanted, rows = smoothed_pair(weight, unseen, exponents)
    errors = {
        method: output_error(wanted, fit(weight, exponents, block, known, method, bits).dense(), rows)
        for method in methods
    }
    method = min(errors, key=lambda name: errors[name])
    return method, errors[method]


def fit(weight: Floats, exponents: Exponents, block: int, rows: Floats, method: str, bits: int) -> Blocks:
    """One layer's blocks by one method."""
    smooth_weight, smooth_rows = smoothed_pair(weight, rows, exponents)
    return FITS[method](smooth_weight, block, smooth_rows, bits)


def bits_of(linear: Linear) -> int:
    """4, or 8 for an odd number of columns, which TensorRT's parser does not take in 4 bits."""
    return 8 if linear.shape[1] % 2 else 4


def smoothed_pair(weight: Floats, rows: Floats, exponents: Exponents) -> tuple[Floats, Floats]:
    """Weight (K, N) times 2^exponents, rows (R, K) divided by it."""
    shift = exponents.astype(np.int32)
    return np.ldexp(weight, shift[:, None]), np.ldexp(rows, -shift)


def entry(
    linears: Sequence[Linear], observer: Observer, method: str, error: float, exponents: Exponents
) -> TensorScale:
    """The scale table's line; its threshold clips nothing and serves runs that quantise the activation too."""
    return TensorScale(
        threshold=float(np.ldexp(observer.channels, -exponents.astype(np.int32)).max()),
        method=method,
        largest=observer.histogram.largest,
        error=error,
        layers=tuple(linear.name for linear in linears),
        smooth=tuple(exponents.tolist()) if exponents.any() else (),
    )
