"""Frames on their way to the vision stage: whole groups, a few at a time.

Decodes and resizes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

__all__ = ["FRAME_BATCH", "batches", "whole_groups"]

FRAME_BATCH = 4  # frames decoded, resized and sent through vision together


def whole_groups(frames: int, group: int) -> int:
    """The largest number of frames that is a whole number of groups, at most ``frames`` but at least one group."""
    return group * max(1, frames // group)


def batches(
    frames: Iterable[NDArray[np.uint8]], group: int, most: int = FRAME_BATCH, least: int = 1
) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """Whole groups of frames, about ``most`` frames at a time, each with the number of its first group.

    The last frame is repeated where it ends an incomplete group, or a batch of fewer than ``least`` frames.
    """
    size = whole_groups(most, group)
    rest = iter(frames)
    start = 0
    while batch := list(islice(rest, size)):
        batch += [batch[-1]] * max(-len(batch) % group, least - len(batch))
        yield start, batch
        start += len(batch) // group
