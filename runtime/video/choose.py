"""Which frames of a video the model sees: a number of them, spread evenly, or so many per second.

Spread evenly is the released evaluation's rule: the range is cut into ``count`` segments and each gives the
frame at its middle. A range with fewer frames than ``count`` repeats frames; that is how a clip shorter than
the fewest frames a model needs is answered at all. Frames per second is by the clock, not by the frame
number, so it holds for videos of variable frame rate: at every tick the frame then on display.

Works on timestamps alone and decodes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import OptionError

CLOCK_SLACK = 1e-6  # s; far above float64 rounding of a timestamp, far below any frame interval


@dataclass(frozen=True)
class FrameChoice:
    """What the user asked for; None leaves it to the bundle. Contradictions are an ``OptionError``.

    Attributes:
        frames: how many frames, spread evenly over the range.
        fps: frames per second of video, instead of ``frames``.
        start, end: range in seconds from the first frame; ``end`` itself is outside.
    """

    frames: int | None = None
    fps: float | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.fps is not None:
            raise OptionError(f"frames ({self.frames}) and fps ({self.fps:g}) are both given; give one of them")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise OptionError(f"fps is {self.fps:g}, expected a finite number above 0; try fps 1")
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise OptionError(
                    f"{name} is {value:g}, expected seconds from the first frame, 0 or more; change {name}"
                )
        if self.end is not None and (self.start or 0.0) >= self.end:
            raise OptionError(f"start ({self.start or 0.0:g} s) is not before end ({self.end:g} s); swap or move them")


def uniform_indices(first: int, last: int, count: int) -> NDArray[np.int64]:
    """Middles of ``count`` equal segments of frames ``first`` to ``last`` -> (count,) int64, ascending.

    ``np.round`` rounds halves to even, as the released code does. The result never passes ``last``: the
    greatest value before truncation is last - seg/2 + 1/2, below last + 1.
    """
    assert 0 <= first <= last and count >= 1, (first, last, count)
    segment = (last - first) / count
    offsets = np.round(segment * np.arange(count))  # (count,) f64
    return (first + segment / 2 + offsets).astype(np.int64)


def choose(
    timestamps: NDArray[np.float64], choice: FrameChoice, *, minimum: int, default: int, maximum: int
) -> NDArray[np.int64]:
    """Timestamps (n,) f64, ascending from 0 -> indices (k,) int64, ascending, minimum <= k <= maximum.

    Raises:
        OptionError: the range lies outside the video, or the number of frames outside [minimum, maximum].
    """
    assert timestamps.ndim == 1 and timestamps.size >= 1 and 1 <= minimum <= maximum
    _check_range(timestamps, choice)
    if choice.fps is not None:
        ticks = _ticks(timestamps, choice, choice.fps, maximum)
        if ticks.size >= minimum:
            return _on_display(timestamps, ticks)
        count = minimum
    else:
        count = _count(choice.frames, minimum, default, maximum)
    return uniform_indices(*_bounds(timestamps, choice), count)


def _check_range(timestamps: NDArray[np.float64], choice: FrameChoice) -> None:
    """Refuse a range that leaves the video.

    The last frame counts as shown for the longest interval between frames, a lone one for 1 s.
    """
    interval = float(np.diff(timestamps).max()) if timestamps.size > 1 else 1.0
    length = float(timestamps[-1]) + interval + CLOCK_SLACK
    for name, value in (("start", choice.start), ("end", choice.end)):
        if value is not None and (value > length or (name == "start" and value >= length - CLOCK_SLACK)):
            raise OptionError(
                f"{name} is {value:g} s but the video's last frame is at {timestamps[-1]:.3f} s; lower {name}"
            )


def _count(frames: int | None, minimum: int, default: int, maximum: int) -> int:
    count = default if frames is None else frames
    if not minimum <= count <= maximum:
        raise OptionError(
            f"{count} frames asked for, the bundle takes {minimum} to {maximum}; ask for a number in between"
        )
    return count


def _bounds(timestamps: NDArray[np.float64], choice: FrameChoice) -> tuple[int, int]:
    """First and last index with start <= t < end; between two frames, the one on display at start."""
    first = int(np.searchsorted(timestamps, (choice.start or 0.0) - CLOCK_SLACK, side="left"))
    end = math.inf if choice.end is None else choice.end - CLOCK_SLACK
    last = max(0, int(np.searchsorted(timestamps, end, side="left")) - 1)
    return (first, last) if first <= last else (last, last)


def _ticks(timestamps: NDArray[np.float64], choice: FrameChoice, fps: float, maximum: int) -> NDArray[np.float64]:
    """start, start + 1/fps, ... before the end, or up to the last frame where no end is given -> (k,) f64."""
    start = choice.start or 0.0
    if choice.end is None:
        count = math.floor(max(0.0, timestamps[-1] - start) * min(fps, 1e9) + CLOCK_SLACK) + 1
    else:
        count = math.ceil((choice.end - start) * min(fps, 1e9) - CLOCK_SLACK)
    if count > maximum:
        raise OptionError(
            f"{fps:g} fps gives {count} frames, the bundle takes at most {maximum}; "
            "lower --fps or narrow the range with --start and --end"
        )
    return start + np.arange(max(count, 1)) / fps


def _on_display(timestamps: NDArray[np.float64], ticks: NDArray[np.float64]) -> NDArray[np.int64]:
    """The last frame at or before each tick."""
    return (np.searchsorted(timestamps, ticks + CLOCK_SLACK, side="right") - 1).astype(np.int64)
