"""What every patch and every LinVT token of a clip shows: the direct targets of the early training stages.

Labels come from the masks the clip was painted with. Does not paint.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.demo.scenes import COLOURS, DIRECTIONS, Digit, Scene

__all__ = ["Labels", "label_clip"]

Ints = NDArray[np.int64]
SHARE = 0.06  # a cell shows a digit from this mean coverage on
FULL = 0.25  # coverage at which a token is as significant as it gets


class Labels(NamedTuple):
    """Targets of a clip of T frames; -1 where a cell shows no digit.

    Patches: ``digit`` (T, 64), ``colour`` (T, 64). Tokens, each (T, 16): ``facts`` (T, 16, 5) holds digit, colour,
    direction, late, gone; ``weight`` (T, 16) f32 is how much of a digit the token holds, 0..1.
    """

    digit: Ints
    colour: Ints
    facts: Ints
    weight: NDArray[np.float32]


def label_clip(scene: Scene, layers: NDArray[np.float32]) -> Labels:
    """Labels from the masks (digits, T, 64, 64) of a scene."""
    known = np.array([facts(digit) for digit in scene.digits])  # (digits, 5)
    _, patch = owner(layers, 8)
    cover, token = owner(layers, 4)
    shown = np.concatenate([known, np.full((1, 5), -1)])  # owner -1 is no digit
    weight = (cover / FULL).clip(0, 1).astype(np.float32)
    return Labels(shown[patch, 0], shown[patch, 1], shown[token], weight)


def facts(digit: Digit) -> tuple[int, int, int, int, int]:
    """Digit, colour, direction, late, gone as class numbers."""
    colour, direction = tuple(COLOURS).index(digit.colour), tuple(DIRECTIONS).index(digit.direction)
    return digit.value, colour, direction, int(digit.late), int(digit.gone)


def owner(layers: NDArray[np.float32], cells: int) -> tuple[NDArray[np.float32], Ints]:
    """Coverage (T, cells^2) by the digit that covers each cell most, and its index or -1."""
    count, frames, size = layers.shape[:3]
    side = size // cells
    cover = layers.reshape(count, frames, cells, side, cells, side).mean((3, 5)).reshape(count, frames, -1)
    best = cover.max(0)
    return best, np.where(best > SHARE, cover.argmax(0), -1)
