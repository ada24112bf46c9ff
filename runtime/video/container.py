"""Video files of any kind PyAV's ffmpeg reads, and their bytes, as a ``FrameSource``.

The file is read twice: once for the times of its frames without decoding (``timeline``), once for the frames
asked for (``decode``). Memory does not grow with the length of the video but for some tens of bytes a frame.

Does not read live streams and does not pick among several video streams: ffmpeg's first choice is taken.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from runtime.errors import VideoError
from runtime.video.decode import FrameReader
from runtime.video.opening import open_stream, reason, translated
from runtime.video.orient import rgb_from_frame
from runtime.video.source import Frame, check_indices
from runtime.video.timeline import Timeline, timeline_from_stream


class ContainerSource:
    """A video file, or the bytes of one.

    Entering reads the timeline; each ``frames`` call opens the file for itself.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        self._name = source.name if isinstance(source, Path) else "the video"
        self._timeline: Timeline | None = None
        self._converter = VideoReformatter()

    def __enter__(self) -> ContainerSource:
        with self._file() as file, translated(self._name):
            container, stream = open_stream(file, self._name)
            with container:
                self._timeline = timeline_from_stream(container, stream, self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the timeline; no file is open between calls."""
        self._timeline = None

    @property
    def timestamps(self) -> NDArray[np.float64]:
        """Presentation times in seconds from the first frame, (n,) f64."""
        return self._entered().seconds

    def frames(self, indices: NDArray[np.int64]) -> Iterator[Frame]:
        """Decodes forward; frames that were not asked for are neither converted nor kept."""
        timeline = self._entered()
        check_indices(indices, timeline.keys.size)
        return self._frames(timeline, indices)

    def _frames(self, timeline: Timeline, indices: NDArray[np.int64]) -> Iterator[Frame]:
        with self._file() as file, FrameReader(lambda: open_stream(file, self._name), timeline) as reader:
            shown, rgb = -1, np.empty((0, 0, 3), np.uint8)
            for index in indices.tolist():
                if index != shown:
                    shown, rgb = index, self._rgb(reader, timeline, index)
                yield rgb

    def _rgb(self, reader: FrameReader, timeline: Timeline, index: int) -> Frame:
        with translated(self._name):
            frame = reader.frame_at(int(timeline.keys[index]))
            if frame is not None:
                return rgb_from_frame(frame, self._converter)
        raise VideoError(
            f"{self._name}: the frame at {timeline.seconds[index]:.3f} s cannot be decoded, "
            "the file is damaged there; copy it again or choose another range"
        ) from reader.damage

    def _entered(self) -> Timeline:
        assert self._timeline is not None, "a source is used inside `with`"
        return self._timeline

    def _file(self) -> BinaryIO:
        """The bytes of the video, open for reading."""
        if isinstance(self._source, bytes):
            return io.BytesIO(self._source)
        try:
            return self._source.open("rb")
        except (OSError, ValueError) as error:
            raise VideoError(
                f"{self._name}: cannot be opened ({reason(error)}); check the path and its permissions"
            ) from error
