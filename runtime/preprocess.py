"""RGB frames -> what the vision stage is fed, exactly as the model's published preprocessing makes it.

Three ways to fit a frame into the tower's square. "stretch" and "pad" resize as uint8 by Pillow's own filter
(antialiased), then divide by 255 and normalise in float32: a uint8 has 256 values, so the float part is one table per
channel, the same numbers without a float copy of a frame. "letterbox" resizes in float32 (``letterbox``) and knows
which pixels are real.

Does not tile images and does not decode video.
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
from runtime.letterbox import coverage, letterboxed

__all__ = ["Preprocess", "pixel_values_from_frames", "vision_feeds"]

Resample = Literal["bicubic", "bilinear"]
Fit = Literal["stretch", "pad", "letterbox"]
Floats = NDArray[np.float32]

MAX_SIDE = 4096  # pixels; a vision tower's input is far smaller
RESAMPLING: dict[str, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the vision tower wants; a part of the bundle's manifest. A value out of range is a ``ValueError``.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, red first, of values in 0..1.
        resample: filter of the resize.
        fit: "stretch" resizes to ``size`` without keeping the aspect ratio; "pad" centres the frame in a square of
            the colour ``fill`` first; "letterbox" keeps the ratio, resizes bilinearly in float32 and surrounds with
            black.
        fill: colour of the padding, 0 to 255, red first.
        rescale: factor from uint8 to 0..1.
        mask_patch: side of the patches, in pixels, whose share of real pixels the vision stage takes as its second
            input ``pixel_mask``; 0 where it takes none, as all do that are not letterboxed.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    fit: Fit = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)
    rescale: float = 1 / 255
    mask_patch: int = 0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(1 <= side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is {self.size}, expected (height, width) of 1 to {MAX_SIDE} pixels")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}, expected three finite numbers")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}, expected three finite numbers above 0")
        if not (math.isfinite(self.rescale) and self.rescale > 0):
            raise ValueError(f"rescale is {self.rescale}, expected a finite number above 0")
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise ValueError(f"fill is {self.fill}, expected three numbers of 0 to 255")
        for name, known in (("resample", get_args(Resample)), ("fit", get_args(Fit))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {list(known)}")
        self._check_letterbox()

    def _check_letterbox(self) -> None:
        if self.fit == "letterbox" and self.resample != "bilinear":
            raise ValueError(f"resample is {self.resample!r}, expected 'bilinear' where fit is 'letterbox'")
        if self.mask_patch and (self.mask_patch < 0 or any(side % self.mask_patch for side in self.size)):
            raise ValueError(f"mask_patch is {self.mask_patch}, expected a divisor of both sides of {self.size}")
        if self.mask_patch and self.fit != "letterbox":
            raise ValueError(f"mask_patch is {self.mask_patch}, expected 0 unless fit is 'letterbox'")

    @property
    def mask_patches(self) -> int:
        """Patches of a frame in ``pixel_mask``."""
        return self.size[0] // self.mask_patch * (self.size[1] // self.mask_patch) if self.mask_patch else 0


def vision_feeds(frames: Iterable[NDArray[np.uint8]], spec: Preprocess) -> dict[str, Floats]:
    """(H, W, 3) uint8 RGB frames, of any sizes -> the vision stage's inputs by name.

    ``pixel_values`` (F, 3, height, width) f32 always, ``pixel_mask`` (F, patches) f32 where the spec asks for it: the
    share of real pixels in every patch, row by row.
    """
    frames = list(frames)
    feeds = {"pixel_values": pixel_values_from_frames(frames, spec)}
    if spec.mask_patch:
        masks = [coverage(frame.shape[:2], spec.size, spec.mask_patch) for frame in frames]
        feeds["pixel_mask"] = np.array(masks, np.float32).reshape(len(frames), spec.mask_patches)
    return feeds


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
    if spec.fit == "letterbox":
        mean, std = (np.array(part, np.float32)[:, None, None] for part in (spec.mean, spec.std))
        scaled = letterboxed(frame, spec.size) / np.float32(1 / spec.rescale)
        values[:] = (scaled.clip(0, 1) - mean) / std
        return
    height, width = spec.size
    image = Image.fromarray(frame)
    if spec.fit == "pad" and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), spec.fill)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    resized = np.asarray(image.resize((width, height), RESAMPLING[spec.resample]))
    for channel in range(3):
        np.take(table[channel], resized[:, :, channel], out=values[channel])
