"""Frames that are already in memory: one numpy array, one frame per second.

Does not copy the array and does not convert other dtypes or channel orders: it refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from runtime.errors import VideoError
from runtime.video.source import Frame, check_indices


class ArraySource:
    """A (T, H, W, 3) uint8 RGB array as a ``FrameSource``."""

    def __init__(self, array: NDArray[np.uint8]) -> None:
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape:
            raise VideoError(
                f"the array is {array.dtype} {array.shape}; expected uint8 (T, H, W, 3) RGB with at least one frame"
            )
        self._array = array.view()
        self._array.flags.writeable = False

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """0, 1, 2, ... seconds, (T,) f64."""
        return np.arange(len(self._array), dtype=np.float64)

    def frames(self, indices: NDArray[np.int64]) -> Iterator[Frame]:
        """Views of the array, in the order of the indices."""
        check_indices(indices, len(self._array))
        return (self._array[index] for index in indices)

    def close(self) -> None:
        """Nothing to free: the array is the caller's."""

    def __enter__(self) -> ArraySource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
