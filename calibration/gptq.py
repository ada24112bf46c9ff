"""GPTQ: weights rounded one input channel after the other, the channels still to come making good for the error.

Frantar et al. 2022, arXiv 2210.17323. The Hessian ``X^T X`` of R sampled rows has at most rank R beside its damping,
so neither it nor its inverse is built: what algorithm 1 takes from the Cholesky factor of the inverse comes from
recursive least squares over the rows, in O(R K (R + N)) instead of O(K^3 + K^2 N). The result is the same.

Does not move channels in the result: their order is that of rounding alone, so a graph needs no indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.blocks import Blocks, Floats, Integers, check_rows, check_weight, fitted_scales

__all__ = ["gptq"]

Doubles = NDArray[np.float64]

_BATCH = 128  # channels whose errors reach the later ones together, as in the paper


@dataclass(frozen=True)
class _Batch:
    """What a batch of B channels needs to know about X once all channels before it are fixed.

    Attributes:
        places: where it is in the order of rounding.
        inputs: (R, B) f64, its columns of X over the root of the damping.
        gain: (R, B) f64, how its errors move the state that later channels are corrected from.
        spread: (B, B) f32, strictly upper: how much channel j takes of an error of channel i.
    """

    places: slice
    inputs: Doubles
    gain: Doubles
    spread: Floats


def gptq(
    weight: Floats, block: int, rows: Floats, bits: int = 4, damping: float = 0.01, act_order: bool = True
) -> Blocks:
    """Blocks of little output error on ``rows``, chosen greedily channel by channel.

    Args:
        weight: (K, N) f32.
        block: rows that share a scale.
        rows: (R, K) f32, sampled activations; R may be smaller than K.
        bits: 4 or 8.
        damping: added to the Hessian's diagonal, as a part of its mean; above 0.
        act_order: round the channels of the largest activations first, with the scales of ``clipped``. Otherwise in
            their own order, each block's scales fitted to what its weights have become when its turn comes.
    """
    check_weight(weight, block, bits)
    check_rows(rows, len(weight))
    importance = np.square(rows, dtype=np.float64).mean(0)  # (K,)
    order = np.argsort(-importance, kind="stable") if act_order else np.arange(len(weight))
    inputs = _damped(rows, damping)[:, order]
    values, scales = np.empty(weight.shape, np.int8), _fitted(weight, importance, block, bits)
    state = np.zeros((len(inputs), weight.shape[1]))  # (R, N) f64
    for batch in _batches(inputs, block * max(1, _BATCH // block)):
        here = order[batch.places]
        current = (weight[here] + batch.inputs.T @ state).astype(np.float32)
        used = scales[here // block]  # (B, N)
        values[here] = _quantised(current, used, batch.spread, None if act_order else importance[here], block, bits)
        scales[here // block] = used
        state += batch.gain @ (current - values[here] * used)
    return Blocks(values, scales, bits, block)


def _fitted(weight: Floats, importance: Doubles, block: int, bits: int) -> Floats:
    """Scales (K / block, N) f32 of ``weight`` (K, N) or of a part of it."""
    return fitted_scales(weight.reshape(-1, block, weight.shape[1]), importance.reshape(-1, block), bits)


def _damped(rows: Floats, damping: float) -> Doubles:
    """X (R or K if that is less, K) f64 with the X^T X of ``rows``, in units in which the damping is the identity."""
    assert damping > 0
    inputs: Doubles = rows.astype(np.float64)
    if len(rows) > rows.shape[1]:
        inputs = np.asarray(np.linalg.qr(inputs, mode="r"))
    mean = float(np.einsum("rk,rk->", inputs, inputs)) / rows.shape[1]
    inputs /= np.sqrt(damping * mean or 1.0)
    return inputs


def _batches(inputs: Doubles, size: int) -> Sequence[_Batch]:
    """All batches of ``inputs`` (R, K), first to last.

    For a batch B, and F all channels from B on, algorithm 1 reads the (B, B) corner of ``(I + X_F^T X_F)^-1``. Its
    inverse is ``I + X_B^T C X_B`` with ``C = (I + X_later X_later^T)^-1`` (Woodbury), which from the last batch to the
    first takes no difference of large numbers.
    """
    covariance = np.eye(len(inputs))  # C, (R, R)
    batches = []
    for start in reversed(range(0, inputs.shape[1], size)):
        places = slice(start, min(start + size, inputs.shape[1]))
        columns = inputs[:, places]
        gain = covariance @ columns
        precision = np.eye(columns.shape[1]) + columns.T @ gain
        upper = np.linalg.cholesky(precision[::-1, ::-1])[::-1, ::-1]  # precision = upper upper^T
        inverse = np.linalg.inv(upper)  # the paper's factor of the inverse Hessian
        spread = np.triu(inverse * upper.diagonal()[:, None], 1).astype(np.float32)
        batches.append(_Batch(places, columns, gain, spread))
        half = gain @ inverse.T
        covariance -= half @ half.T
    return batches[::-1]


def _quantised(
    current: Floats, scales: Floats, spread: Floats, importance: Doubles | None, block: int, bits: int
) -> Integers:
    """Values (B, N) of a batch whose weights are ``current`` (B, N) when it begins.

    Where ``importance`` (B,) is given, ``scales`` (B, N) are fitted here, block after block, in place.
    """
    limit = 2 ** (bits - 1)
    values, errors = np.empty(current.shape, np.int8), np.empty_like(current)
    for start in range(0, len(current), block):
        part = slice(start, start + block)
        pending = current[part] - spread[:start, part].T @ errors[:start]
        if importance is not None:
            scales[part] = _fitted(pending, importance[part], block, bits)
        for at in range(start, start + block):
            now = pending[at - start] - spread[start:at, at] @ errors[start:at]
            values[at] = rounded = np.rint(now / scales[at]).clip(-limit, limit - 1)
            errors[at] = now - rounded * scales[at]
    return values
