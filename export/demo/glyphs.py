"""Handwritten digits (scikit-learn's ``load_digits``) as soft-edged masks, in three disjoint splits.

Training glyphs come with small rotations, shears and scalings; validation and test glyphs are as drawn.
Does not place or colour anything: ``scenes`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.errors import DependencyError

__all__ = ["GLYPH", "Glyphs", "Split", "glyphs", "split_indices"]

Split = Literal["train", "validation", "test"]

GLYPH = 16  # side of a mask, in cells
VARIANTS = 12
SHARES = {"train": 1200, "validation": 250, "test": 347}  # of 1797 drawings


@dataclass(frozen=True)
class Glyphs:
    """Masks (G, 16, 16) f32 in 0..1 and the digit each one shows (G,) int64."""

    masks: NDArray[np.float32]
    values: NDArray[np.int64]

    def draw(self, value: int, rng: np.random.Generator) -> int:
        """Index of a random mask that shows ``value``."""
        return int(rng.choice(np.flatnonzero(self.values == value)))


def split_indices(split: Split) -> NDArray[np.int64]:
    """Which drawings of ``load_digits`` belong to a split."""
    order = np.random.default_rng(20241205).permutation(sum(SHARES.values()))
    start = {"train": 0, "validation": SHARES["train"], "test": SHARES["train"] + SHARES["validation"]}[split]
    return order[start : start + SHARES[split]]


@cache
def glyphs(split: Split) -> Glyphs:
    """All masks of a split; training has ``VARIANTS`` of each drawing, the first one as drawn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DependencyError("scikit-learn is not installed; run: pip install 'linvt-edge[dev]'") from error
    data = load_digits()
    chosen = split_indices(split)
    drawings = (data.images[chosen] / 16).astype(np.float32)  # (G, 8, 8)
    values = data.target[chosen].astype(np.int64)
    rng = np.random.default_rng(7)
    masks = [warp(drawings, np.broadcast_to(np.eye(2), (len(chosen), 2, 2)))]
    if split == "train":
        masks += [warp(drawings, distortions(len(chosen), rng)) for _ in range(VARIANTS - 1)]
    return Glyphs(np.concatenate(masks), np.tile(values, len(masks)))


def distortions(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Random small linear maps (count, 2, 2) of output to input coordinates (x, y)."""
    angle = np.deg2rad(rng.uniform(-13, 13, count))
    shear = rng.uniform(-0.18, 0.18, count)
    width, height = rng.uniform(0.9, 1.15, (2, count))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos * width, (shear - sin) * height], 1), np.stack([sin * width, cos * height], 1)], 1)


def warp(drawings: NDArray[np.float32], maps: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sample drawings (G, 8, 8) bilinearly on a 16 x 16 grid seen through linear maps (G, 2, 2)."""
    axis = (np.arange(GLYPH) + 0.5) / GLYPH - 0.5
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)  # (256, 2) as (x, y)
    points = (grid @ maps.transpose(0, 2, 1) + 0.5) * 8 - 0.5 + 1  # (G, 256, 2) in the padded drawing
    padded = np.pad(drawings, ((0, 0), (1, 1), (1, 1)))
    points = points.clip(0, 8.999)
    low = points.astype(np.int64)
    part = (points - low).astype(np.float32)
    rows = np.arange(len(drawings))[:, None]
    x, y, fx, fy = low[..., 0], low[..., 1], part[..., 0], part[..., 1]
    top = padded[rows, y, x] * (1 - fx) + padded[rows, y, x + 1] * fx
    bottom = padded[rows, y + 1, x] * (1 - fx) + padded[rows, y + 1, x + 1] * fx
    sampled: NDArray[np.float32] = (top * (1 - fy) + bottom * fy).astype(np.float32)
    return sampled.reshape(-1, GLYPH, GLYPH)
