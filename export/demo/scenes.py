"""Scenes of one to three coloured digits that move, stay, appear late or leave, and how they look.

A scene is described in fractions of the picture and of the video, so that it renders at any size and at any
times. Digits and colours of a scene are all different, which makes every question about them unambiguous.
Does not ask questions (``questions``) and does not write videos (``video``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.demo.glyphs import GLYPH, Glyphs

__all__ = ["COLOURS", "DIRECTIONS", "Digit", "Scene", "masks", "middle_times", "random_scene", "render"]

Floats = NDArray[np.float32]

COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 190, 70),
    "blue": (60, 100, 240),
    "yellow": (235, 215, 50),
    "white": (238, 238, 238),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
TINT = 18  # a colour's channels vary by this much
GRID = np.linspace(0, 1, 9)


@dataclass(frozen=True)
class Digit:
    """One digit: what it is, how it looks, where its centre goes, and from when to when it is visible."""

    value: int
    colour: str
    direction: str
    glyph: int
    tint: tuple[float, float, float]
    size: float
    start: tuple[float, float]
    end: tuple[float, float]
    appears: float = 0.0
    leaves: float = 1.0

    @property
    def late(self) -> bool:
        """Whether it is absent at first."""
        return self.appears > 0

    @property
    def gone(self) -> bool:
        """Whether it is absent at the end."""
        return self.leaves < 1

    def visible(self, times: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(T,) bool."""
        return (times >= self.appears) & ((times < self.leaves) | (self.leaves >= 1))

    def centres(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, 2) as (x, y), moving evenly while visible."""
        part = ((times - self.appears) / (self.leaves - self.appears)).clip(0, 1)[:, None]
        centres: NDArray[np.float64] = np.asarray(self.start) * (1 - part) + np.asarray(self.end) * part
        return centres


@dataclass(frozen=True)
class Scene:
    """Digits before a background that goes from ``backdrop[0]`` to ``backdrop[1]`` (RGB), with pixel noise."""

    digits: tuple[Digit, ...]
    backdrop: tuple[tuple[float, float, float], tuple[float, float, float]]
    vertical: bool
    noise: float
    seed: int


def random_scene(rng: np.random.Generator, glyphs: Glyphs, count: int | None = None) -> Scene:
    """A scene of ``count`` digits (default: one to three, mostly two or three)."""
    count = int(rng.choice([1, 2, 3], p=[0.2, 0.35, 0.45])) if count is None else count
    values = rng.permutation(10)[:count]
    colours = rng.permutation(list(COLOURS))[:count]
    late, gone = (int(rng.integers(count)) if count > 1 and rng.random() < 0.5 else -1 for _ in range(2))
    digits: list[Digit] = []
    for index in range(count):
        span = (
            float(rng.uniform(0.28, 0.55)) if index == late else 0.0,
            float(rng.uniform(0.45, 0.72)) if index == gone and index != late else 1.0,
        )
        digit = place(rng, glyphs, int(values[index]), str(colours[index]), span, digits)
        if digit is not None:
            digits.append(digit)
    level, shift = rng.uniform(0, 62), rng.normal(0, 12, (2, 3))
    near, far = (level + shift).clip(0, 85)
    return Scene(
        tuple(digits),
        (tuple(near), tuple(far)),
        bool(rng.random() < 0.5),
        float(rng.choice([0, 0, rng.uniform(0, 7)])),
        int(rng.integers(2**31)),
    )


def place(
    rng: np.random.Generator,
    glyphs: Glyphs,
    value: int,
    colour: str,
    span: tuple[float, float],
    others: list[Digit],
) -> Digit | None:
    """Find a path that meets none of the others; None when the picture is too full."""
    tint = tuple(np.clip(np.asarray(COLOURS[colour]) + rng.uniform(-TINT, TINT, 3), 0, 255))
    glyph = glyphs.draw(value, rng)
    for _ in range(60):
        size = float(rng.uniform(0.27, 0.37))
        direction = tuple(DIRECTIONS)[rng.integers(5)]
        start, end = path(rng, size, direction)
        digit = Digit(value, colour, direction, glyph, tint, size, start, end, *span)
        if all(apart(digit, other) for other in others):
            return digit
    return None


def path(rng: np.random.Generator, size: float, direction: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end centre, both with the digit inside the picture."""
    low, high = size / 2, 1 - size / 2
    travel = rng.uniform(0.28, high - low) * np.asarray(DIRECTIONS[direction])
    drift = rng.uniform(-0.04, 0.04, 2) * (travel == 0) * (direction != "still")
    move = travel + drift
    start = rng.uniform(np.maximum(low, low - move), np.minimum(high, high - move))
    end = start + move
    return (float(start[0]), float(start[1])), (float(end[0]), float(end[1]))


def apart(one: Digit, other: Digit) -> bool:
    """Whether two digits keep clear of each other while both are visible."""
    both = one.visible(GRID) & other.visible(GRID)
    gap = np.abs(one.centres(GRID) - other.centres(GRID)).max(1)  # (9,)
    return bool((gap[both] > 0.46 * (one.size + other.size)).all())


def middle_times(frames: int) -> NDArray[np.float64]:
    """The middles of ``frames`` equal segments of a video, as fractions."""
    return (np.arange(frames) + 0.5) / frames


def masks(scene: Scene, glyphs: Glyphs, times: NDArray[np.float64], size: int) -> Floats:
    """How much of every pixel each digit covers: (digits, T, size, size) f32 in 0..1."""
    pixels = (np.arange(size) + 0.5) / size
    cells = np.arange(GLYPH)
    layers = np.empty((len(scene.digits), len(times), size, size), np.float32)
    for layer, digit in zip(layers, scene.digits, strict=True):
        inside = pixels - digit.centres(times)[..., None]  # (T, 2, size)
        cell = (inside / digit.size + 0.5) * GLYPH - 0.5
        weights = (1 - np.abs(cell[..., None] - cells)).clip(0, None).astype(np.float32)  # (T, 2, size, 16)
        layer[:] = weights[:, 1] @ glyphs.masks[digit.glyph] @ weights[:, 0].transpose(0, 2, 1)
        layer[~digit.visible(times)] = 0
    return layers


def render(scene: Scene, glyphs: Glyphs, times: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Pictures of the scene: (T, size, size, 3) uint8 RGB."""
    return paint(scene, masks(scene, glyphs, times, size))


def paint(scene: Scene, layers: Floats) -> NDArray[np.uint8]:
    """Colour the masks (digits, T, size, size) over the background."""
    size = layers.shape[-1]
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None]
    near, far = np.asarray(scene.backdrop, np.float32)
    ground = ramp * far + (1 - ramp) * near  # (size, 3)
    picture = np.broadcast_to(ground[:, None] if scene.vertical else ground[None], (layers.shape[1], size, size, 3))
    for layer, digit in zip(layers, scene.digits, strict=True):
        cover = (layer * 1.25).clip(0, 1)[..., None]
        picture = picture * (1 - cover) + np.asarray(digit.tint, np.float32) * cover
    if scene.noise:
        rng = np.random.default_rng(scene.seed)
        picture = picture + rng.standard_normal(picture.shape, np.float32) * scene.noise
    return (picture + 0.5).clip(0, 255).astype(np.uint8)
