"""RGB frames -> normalised ``pixel_values``, exactly as the model's published preprocessing does it.

Each frame is resized by Pillow's bicubic filter (antialiased) as uint8, then divided by 255 and normalised in
float32. A uint8 has 256 values, so the float part is one table per channel: the same numbers, without a float
copy of a frame.

Does not tile images and does not decode video. Ways to fit a frame other than stretching it are for the
families that need them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import VideoError

__all__ = ["Preprocess", "pixel_values_from_frames"]

Resample = Literal["bicubic"]
Fit = Literal["stretch"]

MAX_SIDE = 4096  # pixels; a vision tower's input is far smaller
RESAMPLING: dict[str, Image.Resampling] = {"bicubic": Image.Resampling.BICUBIC}


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the vision tower wants; a part of the bundle's manifest. A value out of range is a ``ValueError``.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, red first, of values in 0..1.
        resample: filter of the resize.
        fit: "stretch" resizes to ``size`` without keeping the aspect ratio.
        rescale: factor from uint8 to 0..1.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    fit: Fit = "stretch"
    rescale: float = 1 / 255

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(1 <= side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is {self.size}, expected (height, width) of 1 to {MAX_SIDE} pixels")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}, expected three finite numbers")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected three finite numbers above 0")
        if not (math.isfinite(self.rescale) and self.rescale > 0):
            raise ValueError(f"rescale is {self.rescale}, expected a finite number above 0")
        for name, known in (("resample", get_args(Resample)), ("fit", get_args(Fit))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")


def pixel_values_from_frames(
    frames: Iterable[NDArray[np.uint8]], spec: Preprocess, *, count: int | None = None
) -> NDArray[np.float32]:
    """(H, W, 3) uint8 RGB frames, of any sizes -> (F, 3, height, width) f32.

    ``count`` is the number of frames where ``frames`` is an iterator: then no more than one is held.
    The same array twice in a row, as a repeated frame comes, is worked on once.
    """
    if count is None:
        frames = list(frames)
        count = len(frames)
    values = np.empty((count, 3, *spec.size), dtype=np.float32)
    table = _table(spec)
    previous, done = None, 0
    for frame in frames:
        if frame is previous:
            values[done] = values[done - 1]
        else:
            _fill(values[done], frame, spec, table)
        previous, done = frame, done + 1
    assert done == count, (done, count)
    return values


def _table(spec: Preprocess) -> NDArray[np.float32]:
    """Normalised value of every uint8, per channel -> (3, 256) f32; divides by 255 as published."""
    scaled = np.arange(256, dtype=np.float32) / np.float32(1 / spec.rescale)
    mean = np.array(spec.mean, dtype=np.float32)[:, None]
    std = np.array(spec.std, dtype=np.float32)[:, None]
    table: NDArray[np.float32] = (scaled - mean) / std
    return table


def _fill(values: NDArray[np.float32], frame: NDArray[np.uint8], spec: Preprocess, table: NDArray[np.float32]) -> None:
    """One (H, W, 3) uint8 frame -> into (3, height, width) f32."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise VideoError(f"a frame is {frame.dtype} {frame.shape}; expected uint8 (H, W, 3) RGB")
    height, width = spec.size
    resized = np.asarray(Image.fromarray(frame).resize((width, height), RESAMPLING[spec.resample]))
    for channel in range(3):
        np.take(table[channel], resized[:, :, channel], out=values[channel])
