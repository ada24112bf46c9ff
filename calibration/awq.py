"""AWQ's channel scales: channels that see large activations get finer steps, their inputs are divided by as much.

Lin et al. 2023, arXiv 2306.00978, equations 4 and 5. ``x @ W = (x / s) @ (s[:, None] * W)``; whoever uses the scales
folds ``1 / s`` into what makes x.

Does not quantise for good and does not clip: ``blocks`` or ``gptq`` do, on the scaled weight and rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.blocks import Floats, check_rows, check_weight, round_to_nearest

__all__ = ["awq_scales"]

_STEPS = 20  # of the exponent from 0 to 1, as in the paper's code
_FLOOR = 1e-4  # of the largest channel's mean: a channel that saw nothing is not scaled to nothing


def awq_scales(weights: Sequence[Floats], rows: Floats, block: int, bits: int = 4) -> Floats:
    """Channel scales s (K,) f32 = mean|x|^alpha with the alpha of least output error; ones where none helps.

    Args:
        weights: (K, N_i) f32 each, all layers that read the same x.
        rows: (R, K) f32, sampled x.
        block: rows that share a scale.
        bits: 4 or 8.
    """
    check_rows(rows, len(weights[0]))
    for weight in weights:
        check_weight(weight, block, bits)
    magnitude = np.abs(rows).mean(0, dtype=np.float64)
    if not magnitude.any():
        return np.ones(rows.shape[1], np.float32)
    magnitude = np.maximum(magnitude / magnitude.max(), _FLOOR)
    candidates = [_centred(magnitude ** (step / _STEPS)) for step in range(_STEPS + 1)]
    errors = [sum(_squared_error(weight, scales, rows, block, bits) for weight in weights) for scales in candidates]
    return candidates[int(np.argmin(errors))]


def _centred(scales: NDArray[np.float64]) -> Floats:
    centred: Floats = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
    return centred


def _squared_error(weight: Floats, scales: Floats, rows: Floats, block: int, bits: int) -> float:
    """``||X W - (X / s) Q(s W)||^2`` with plain rounding as Q."""
    approximation = round_to_nearest(weight * scales[:, None], block, bits).dense()
    approximation /= scales[:, None]
    return float(np.square(rows @ (weight - approximation)).sum(dtype=np.float64))
