"""H.264 in and out with PyAV: what training needs to see pictures as users' videos show them.

Choosing frames and resizing follow the runtime: middles of equal segments, PIL's bicubic filter.
Does not know scenes.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

__all__ = ["decode", "encode", "middle_indices", "resize", "write"]

Frames = NDArray[np.uint8]  # (T, H, W, 3) RGB


def encode(frames: Frames, *, fps: int = 20, crf: int = 23, preset: str = "medium") -> bytes:
    """An MP4 file of the frames, H.264 in yuv420p."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": str(crf), "preset": preset}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode(data: bytes) -> Frames:
    """All frames of a video."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        converter = VideoReformatter()  # one for all frames: a new one starts threads each time
        converted = (converter.reformat(frame, format="rgb24", threads=1) for frame in container.decode(stream))
        return np.stack([frame.to_ndarray() for frame in converted])


def write(path: Path, frames: Frames, *, fps: int = 20, crf: int = 23) -> None:
    """Write a video file."""
    path.write_bytes(encode(frames, fps=fps, crf=crf))


def middle_indices(total: int, frames: int) -> list[int]:
    """The middles of ``frames`` equal segments of a video of ``total`` frames."""
    segment = (total - 1) / frames
    return [int(segment / 2 + round(segment * index)) for index in range(frames)]


def resize(frames: Frames, size: int) -> Frames:
    """(T, H, W, 3) -> (T, size, size, 3), PIL's antialiased bicubic filter."""
    if frames.shape[1:3] == (size, size):
        return frames
    square = (size, size)
    return np.stack([np.asarray(Image.fromarray(frame).resize(square, Image.Resampling.BICUBIC)) for frame in frames])
