"""Weights of a linear layer as small integers with a scale per block: rounding, and scales that fit the inputs.

A layer is ``y = x @ W`` with W (K, N); a block is ``block`` rows of one column. The form is that of ONNX
``DequantizeLinear(values, scales, axis=0, block_size=block)`` without zero points.

Looks at every weight alone: ``gptq`` lets later weights make good for earlier ones, ``awq`` scales channels first.
Writes no graph and knows no layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import CalibrationError

__all__ = ["Blocks", "check_rows", "check_weight", "clipped", "fitted_scales", "output_error", "round_to_nearest"]

Floats = NDArray[np.float32]
Weights = NDArray[np.floating[Any]]
Integers = NDArray[np.int8]

_SMALLEST = np.float32(np.finfo(np.float32).tiny)  # below are subnormals, which some devices take for zero
_RATIOS = tuple(step / 40 for step in range(42, 4, -1))  # of the full range; 35/40 puts the largest magnitude at 8
_PIECE = 1 << 17  # weights that a search looks at together: a few buffers of them stay in a core's cache


@dataclass(frozen=True)
class Blocks:
    """A quantised weight.

    Attributes:
        values: (K, N) i8 within ``bits``: -8..7 or -128..127.
        scales: (K / block, N) f32, normal and positive.
        bits: 4 or 8.
        block: rows that share a scale.
    """

    values: Integers
    scales: Floats
    bits: int
    block: int

    def dense(self) -> Floats:
        """What a graph computes with, (K, N) f32: ``values[k, n] * scales[k // block, n]``."""
        dense: Floats = self.values.reshape(-1, self.block, self.values.shape[1]) * self.scales[:, None]
        return dense.reshape(self.values.shape)


def round_to_nearest(weight: Floats, block: int, bits: int = 4) -> Blocks:
    """The baseline: the largest magnitude of a block is the largest integer. ``weight`` is (K, N) f32."""
    check_weight(weight, block, bits)
    return _rounded(weight, _full_scales(_split(weight, block), bits), block, bits)


def clipped(weight: Floats, block: int, importance: Weights, bits: int = 4) -> Blocks:
    """Rounding to the scales of least ``sum importance[k] * (w - w_hat)^2`` in every block.

    Args:
        weight: (K, N) f32.
        block: rows that share a scale.
        importance: (K,) f32, the mean square of what enters channel k.
        bits: 4 or 8.
    """
    check_weight(weight, block, bits)
    if not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise CalibrationError(
            f"a channel's importance is {importance.min()} to {importance.max()}, expected finite numbers from 0; "
            "calibrate with clips whose activations stay finite"
        )
    return _rounded(weight, fitted_scales(_split(weight, block), importance.reshape(-1, block), bits), block, bits)


def fitted_scales(blocks: Floats, importance: Weights, bits: int) -> Floats:
    """Scales (G, N) f32 of least weighted square error for ``blocks`` (G, B, N) f32, ``importance`` (G, B).

    Tries ranges that clip the few largest weights and give the others finer steps, as AWQ's clipping search does (Lin
    et al. 2023, arXiv 2306.00978). The integers of each range, out of all of -8..7, get the scale that least squares
    gives them, ``sum(i w q) / sum(i q^2)``, as in ggml's quantisers: it matters where one channel outweighs its block.
    """
    groups, size, columns = blocks.shape
    width = min(columns, max(1, _PIECE // size))
    depth = max(1, _PIECE // (size * width))
    largest = importance.max(1, keepdims=True)
    weights = np.divide(importance, largest, out=np.zeros_like(importance), where=largest > 0).astype(np.float32)
    scales = np.empty((groups, columns), np.float32)
    for first in range(0, groups, depth):
        for left in range(0, columns, width):
            piece = slice(first, first + depth), slice(left, left + width)
            scales[piece] = _searched(blocks[piece[0], :, piece[1]], weights[piece[0]], bits)
    return scales


def output_error(weight: Floats, approximation: Floats, rows: Floats) -> float:
    """``||X W - X W_hat|| / ||X W||`` (Frobenius) for both (K, N) f32 and ``rows`` X (R, K) f32."""
    wanted = float(np.linalg.norm(rows @ weight))
    missed = float(np.linalg.norm(rows @ (weight - approximation)))
    return missed / wanted if wanted else missed


def check_weight(weight: Floats, block: int, bits: int) -> None:
    """Refuse a weight (K, N) that has no such blocks or is not finite."""
    assert bits in (4, 8) and weight.ndim == 2
    if block < 1 or len(weight) % block:
        raise CalibrationError(
            f"a weight has {len(weight)} input channels, expected a multiple of the block size {block}; "
            "choose a block size that divides it"
        )
    if not np.isfinite(weight).all():
        raise CalibrationError(
            f"a weight {list(weight.shape)} holds NaN or infinite values, expected finite ones; export it again"
        )


def check_rows(rows: Floats, channels: int) -> None:
    """Refuse activations (R, K) that are none or not finite."""
    assert rows.ndim == 2 and rows.shape[1] == channels
    if not len(rows) or not np.isfinite(rows).all():
        found = "NaN or infinite activations" if len(rows) else "no activations"
        raise CalibrationError(
            f"a layer of {channels} channels saw {found}, expected finite rows; calibrate with other clips"
        )


def _split(weight: Floats, block: int) -> Floats:
    return weight.reshape(-1, block, weight.shape[1])


def _full_scales(blocks: Floats, bits: int) -> Floats:
    """(G, B, N) to (G, N); 1 for zeros."""
    largest = np.maximum(blocks.max(1), -blocks.min(1))
    scales: Floats = np.maximum(largest / np.float32(2 ** (bits - 1) - 1), _SMALLEST)
    scales[largest == 0] = 1
    return scales


def _rounded(weight: Floats, scales: Floats, block: int, bits: int) -> Blocks:
    limit = 2 ** (bits - 1)
    values = np.rint(_split(weight, block) / scales[:, None]).clip(-limit, limit - 1).astype(np.int8)
    return Blocks(values.reshape(weight.shape), scales, bits, block)


def _searched(blocks: Floats, importance: Floats, bits: int) -> Floats:
    """``fitted_scales`` of one piece; computed in units of the full scale, which neither overflow nor vanish."""
    limit = 2 ** (bits - 1)
    full = _full_scales(blocks, bits)
    units = blocks / full[:, None]  # (G, B, N), within -limit..limit
    weights = importance[:, None]  # (G, 1, B)
    best, most = np.ones_like(full), np.zeros_like(full)
    values, products = np.empty_like(units), np.empty_like(units)
    for ratio in _RATIOS:
        np.multiply(units, np.float32(1 / ratio), out=values)
        np.rint(values, out=values)
        np.clip(values, -limit, limit - 1, out=values)
        along = np.matmul(weights, np.multiply(units, values, out=products))[:, 0]  # (G, N)
        square = np.matmul(weights, np.multiply(values, values, out=products))[:, 0]
        gained = np.divide(along * along, square, out=np.zeros_like(square), where=square > 0)
        better = gained > most
        best[better] = along[better] / square[better]
        most[better] = gained[better]
    scales: Floats = np.maximum(full * best, _SMALLEST)
    return scales
