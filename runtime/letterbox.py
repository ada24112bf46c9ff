"""A frame inside a square with its ratio kept, resized in float32: Molmo's ``resize_and_pad``.

The filter is PyTorch's antialiased bilinear one, whose weights are single precision: Pillow's are exact, which is a
visible difference (5e-6 of white) to everything the model was recorded with. A resize is a product with a narrow band
of weights along each axis, and a matrix product of a few rows at a time is the fastest form of it.

Does not normalise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["coverage", "letterboxed"]

Floats = NDArray[np.float32]
Band = tuple[slice, slice, Floats]

BAND = 8  # output rows of one matrix product; measured best from 640 x 480 to 4000 x 4000


def letterboxed(frame: NDArray[np.uint8], size: tuple[int, int]) -> Floats:
    """One (H, W, 3) uint8 frame -> (3, height, width) f32 of 0..255 in the middle of black."""
    rows, columns = placed(frame.shape[:2], size)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    low = resized(frame.reshape(len(frame), -1), height).reshape(height, -1, 3)
    small = resized(low.swapaxes(0, 1).reshape(frame.shape[1], -1), width)  # (width, height * 3)
    values = np.zeros((3, *size), np.float32)
    values[:, rows, columns] = small.reshape(width, height, 3).T
    return values


def coverage(frame: Sequence[int], size: tuple[int, int], patch: int) -> Floats:
    """Share of real pixels in every patch of a letterboxed frame (height, width) -> (patches,) f32, row by row."""
    counts = []
    for real, side in zip(placed(frame, size), size, strict=True):
        line = np.zeros(side, np.float32)
        line[real] = 1
        counts.append(line.reshape(-1, patch).sum(axis=1))
    shares: Floats = np.outer(*counts).reshape(-1) / np.float32(patch**2)
    return shares


def placed(frame: Sequence[int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that a frame (height, width) takes; in float32 and truncated, as published.

    A side that would vanish keeps one pixel, where the published code fails.
    """
    scale = min(np.float32(wanted) / np.float32(given) for wanted, given in zip(size, frame, strict=True))
    sides = [max(1, int(np.float32(given) * scale)) for given in frame]
    starts = [(wanted - side) // 2 for wanted, side in zip(size, sides, strict=True)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def resized(lines: NDArray[np.generic], wanted: int) -> Floats:
    """(given, C) -> (wanted, C) f32 along the first axis."""
    values = np.empty((wanted, lines.shape[1]), np.float32)
    for made, read, weights in bands(len(lines), wanted):
        np.matmul(weights, lines[read].astype(np.float32, copy=False), out=values[made])
    return values


@lru_cache(maxsize=32)
def bands(given: int, wanted: int) -> tuple[Band, ...]:
    """Which rows are made of which, with what weights (made, read) f32, a few rows at a time."""
    scale = np.float32(given) / np.float32(wanted)
    reach = max(scale, np.float32(1))  # a triangle as wide as two rows of the coarser side
    centres = (scale * (np.arange(wanted) + 0.5)).astype(np.float32)
    found: list[Band] = []
    for start in range(0, wanted, BAND):
        centre = centres[start : start + BAND, None]
        first = max(int(centre[0, 0] - reach + 0.5), 0)
        last = min(int(centre[-1, 0] + reach + 0.5), given)
        distance = np.arange(first, last, dtype=np.float32) - centre + np.float32(0.5)
        weights = np.maximum(1 - np.abs(distance / reach), 0)
        found.append((slice(start, start + len(centre)), slice(first, last), weights / weights.sum(1, keepdims=True)))
    return tuple(found)
