"""Small pictures of one digit each, cut out of a frame: the cheapest lesson for the vision tower.

A crop of 4 x 4 patches comes with the place it was cut from, so that the tower learns all of its positions.
Nothing moves here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.demo.glyphs import GLYPH, glyphs
from export.demo.labels import SHARE
from export.demo.model import VISION
from export.demo.scenes import COLOURS, TINT

__all__ = ["SIDE", "Crops", "crops"]

CELLS = 4  # patches along one side of a crop
SIDE = CELLS * VISION.patch_size


class Crops(NamedTuple):
    """Pictures (B, 32, 32, 3) uint8, places (B, 16) int64 in the frame's grid, labels (B, 16), -1 for none."""

    frames: Tensor
    places: Tensor
    digit: Tensor
    colour: Tensor


def crops(rng: np.random.Generator, count: int) -> Crops:
    """Random crops with training drawings."""
    source = glyphs("train")
    glyph = rng.integers(len(source.values), size=count)
    colour = rng.integers(len(COLOURS), size=count)
    layers = cover(rng, source.masks[glyph])  # (B, 32, 32)
    patch = layers.reshape(count, CELLS, 8, CELLS, 8).mean((2, 4)).reshape(count, -1)
    shown = patch > SHARE
    labels = [np.where(shown, of[:, None], -1) for of in (source.values[glyph], colour)]
    frames = paint(rng, layers, np.array(list(COLOURS.values()))[colour])
    return Crops(*(torch.from_numpy(part) for part in (frames, corners(rng, count), *labels)))


def cover(rng: np.random.Generator, masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Glyph masks (B, 16, 16) at random sizes and places, at most a little cut off: (B, 32, 32)."""
    size = rng.uniform(0.26, 0.38, (len(masks), 1)) * VISION.image_size
    centre = rng.uniform(size / 2 - 4, SIDE - size / 2 + 4, (2, len(masks), 1))
    cell = ((np.arange(SIDE) + 0.5 - centre) / size + 0.5) * GLYPH - 0.5  # (2, B, 32)
    weights = (1 - np.abs(cell[..., None] - np.arange(GLYPH))).clip(0, None).astype(np.float32)
    layers: NDArray[np.float32] = weights[0] @ masks @ weights[1].transpose(0, 2, 1)
    return layers


def paint(rng: np.random.Generator, layers: NDArray[np.float32], colours: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Tinted masks on plain dark grounds, half of them noisy."""
    count = len(layers)
    tint = (colours + rng.uniform(-TINT, TINT, (count, 3))).clip(0, 255)[:, None, None]
    ground = (rng.uniform(0, 62, (count, 1)) + rng.normal(0, 12, (count, 3))).clip(0, 85)[:, None, None]
    alpha = (layers * 1.25).clip(0, 1)[..., None]
    noise = rng.uniform(0, 7, (count, 1, 1, 1)) * (rng.random((count, 1, 1, 1)) < 0.5)
    picture = ground * (1 - alpha) + tint * alpha + noise * rng.standard_normal((*layers.shape, 3), np.float32)
    painted: NDArray[np.uint8] = (picture + 0.5).clip(0, 255).astype(np.uint8)
    return painted


def corners(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Flat grid places (B, 16) of crops cut at random patch borders."""
    row, column = rng.integers(VISION.grid - CELLS + 1, size=(2, count, 1, 1))
    steps = np.arange(CELLS)
    places: NDArray[np.int64] = (row + steps[:, None]) * VISION.grid + column + steps
    return places.reshape(count, -1)
