"""Small test videos, made on the fly: every frame says its number in its pixels.

The upper half of a frame is eight black or white bars, the bits of the number (lowest at the left); the lower
half is grey but for a red square at the left edge, so that turns and mirrors show. ``number_of`` reads it
back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

BITS = 8
WIDTH, HEIGHT = 64, 48
ONE = 1 << 16  # 1.0 in the 16.16 numbers of a tkhd matrix


def numbered(number: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """(height, width, 3) uint8."""
    frame = np.full((height, width, 3), 128, np.uint8)
    edges = np.linspace(0, width, BITS + 1).astype(int)
    for bit in range(BITS):
        frame[: height // 2, edges[bit] : edges[bit + 1]] = 235 if number >> bit & 1 else 16
    frame[3 * height // 4 :, : width // 4] = (200, 20, 20)
    return frame


def number_of(frame: NDArray[np.uint8]) -> int:
    """The number ``numbered`` put into an upright frame."""
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, BITS + 1).astype(int)
    middles = (edges[:-1] + edges[1:]) // 2
    return sum(int(frame[height // 4, x].mean() > 125) << bit for bit, x in enumerate(middles))


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    frames: int = 40,
    rate: int = 10,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixels: str = "yuv420p",
    gop: int = 12,
    b_frames: int = 2,
    pts: Sequence[int] | None = None,
    format: str | None = None,  # noqa: A002
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    audio_seconds: float = 0.0,
) -> Path:
    """Frames numbered from 0; ``pts`` in milliseconds replaces the constant rate."""
    with av.open(str(path), "w", format=format, options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = gop
        if codec in ("libx264", "libx265", "mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = _add_audio(container) if audio_seconds else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number, *size), format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_audio(container, sound, audio_seconds)
    return path


def write_audio(path: Path, codec: str, seconds: float = 0.5) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = _add_audio(container, codec)
        _write_audio(container, stream, seconds)
    return path


def turned(data: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """An MP4 with the 2 x 2 of its track's display matrix replaced: x' = a x + c y, y' = b x + d y."""
    at = data.index(b"tkhd") + 4
    at += 4 + (32 if data[at] == 1 else 20) + 16  # version and flags, times and ids, reserved to volume
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 14)
    return data[:at] + struct.pack(">9i", *(int(value * ONE) for value in matrix)) + data[at + 36 :]


def trimmed(data: bytes, start: int, milliseconds: int) -> bytes:
    """An MP4 whose one edit begins at ``start`` (media time base) and lasts so long."""
    at = data.index(b"elst") + 12  # past type, version and flags, entry count
    return data[:at] + struct.pack(">Ii", milliseconds, start) + data[at + 8 :]


def decode_all(path: Path) -> list[NDArray[np.uint8]]:
    """The slow twin: every frame a plain sequential decode gives."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _add_audio(container: av.container.OutputContainer, codec: str = "aac") -> av.AudioStream:
    stream = container.add_stream(codec, rate=16000)
    stream.codec_context.layout = "mono"
    return stream


def _write_audio(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    format = "s16" if stream.codec_context.name.startswith("pcm") else "fltp"  # noqa: A001
    kind = np.int16 if format == "s16" else np.float32
    for start in range(0, int(seconds * 16000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), kind), format=format, layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
