"""The times of every frame in a video file, from its packets alone: one pass that decodes nothing.

A frame is named by its *key*: its presentation time in units of the stream's time base. Files that do not
tell presentation times (AVI, raw streams, times that are missing or run backwards) are *counted* instead: a
key is then the place of the frame in decoding output, and its time comes from the file's decoding times or
its frame rate.

Left out are packets that never become a picture: those an edit list discards, and those before the first
keyframe or shown before it. Also found here: a file that ends before it says it does.

Keeps three compact arrays (17 bytes a packet) and no packets. Does not seek and does not decode.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from av import Packet
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

from runtime.errors import VideoError
from runtime.video.opening import packets_from

UNKNOWN = -(2**63)  # AV_NOPTS_VALUE
KEYFRAME, DISCARD, CORRUPT = 1, 2, 4
FALLBACK_RATE = Fraction(25)  # frames/s of a raw stream that names none, as ffmpeg assumes


@dataclass(frozen=True)
class Timeline:
    """Frames of a stream in the order they are shown.

    Attributes:
        keys: (n,) int64, ascending; what names a frame.
        seconds: (n,) f64, ascending from 0.
        entries: (k,) int64, ascending keys of keyframes, where decoding can begin; empty if counted.
        entry_dts: (k,) int64 decoding times of the same, UNKNOWN where the file has none.
        counted: keys are places 0 .. n - 1, not times.
    """

    keys: NDArray[np.int64]
    seconds: NDArray[np.float64]
    entries: NDArray[np.int64]
    entry_dts: NDArray[np.int64]
    counted: bool


@dataclass(frozen=True)
class Packets:
    """All packets of a stream in file order, (m,) each, and where the file's streams end in seconds."""

    pts: NDArray[np.int64]
    dts: NDArray[np.int64]
    flags: NDArray[np.uint8]
    video_end: float
    file_end: float


def timeline_from_stream(container: InputContainer, stream: VideoStream, name: str) -> Timeline:
    """Read a freshly opened file to its end -> the times of its frames.

    Raises:
        VideoError: the file holds no frame, or ends early.
    """
    packets = _packets(container, stream)
    if not packets.pts.size:
        raise VideoError(f"{name}: the video stream holds no frames; record or convert it again")
    timeline = _counted(container, stream, packets) or _timed(stream, packets)
    if not timeline.keys.size:
        raise VideoError(f"{name}: no frame of the video can be decoded; record or convert it again")
    _check_end(container, stream, packets, timeline, name)
    return timeline


def _packets(container: InputContainer, stream: VideoStream) -> Packets:
    pts, dts, flags = array("q"), array("q"), array("B")
    ends: dict[int, tuple[int, Fraction]] = {}  # stream index -> end of its last packet, time base
    for packet in _demuxed(container, stream):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is not None and packet.time_base:
            end = (time + (packet.duration or 0), packet.time_base)
            ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
        if packet.stream_index == stream.index:
            pts.append(UNKNOWN if packet.pts is None else packet.pts)
            dts.append(UNKNOWN if packet.dts is None else packet.dts)
            kinds = (packet.is_keyframe, packet.is_discard, packet.is_corrupt)
            flags.append(sum(bit for bit, has in zip((KEYFRAME, DISCARD, CORRUPT), kinds, strict=True) if has))
    seconds = {index: float(end * base) for index, (end, base) in ends.items()}
    return Packets(
        np.frombuffer(pts, np.int64),
        np.frombuffer(dts, np.int64),
        np.frombuffer(flags, np.uint8),
        video_end=seconds.get(stream.index, 0.0),
        file_end=max(seconds.values(), default=0.0),
    )


def _demuxed(container: InputContainer, stream: VideoStream) -> Iterator[Packet[Any]]:
    """Packets with data; of every stream where only the file as a whole says how long it is."""
    streams = () if _is(container, "matroska") else (stream,)
    return (packet for packet in packets_from(container, *streams) if packet.size)


def _timed(stream: VideoStream, packets: Packets) -> Timeline:
    is_key = (packets.flags & KEYFRAME) != 0
    shown = (packets.flags & DISCARD) == 0
    if is_key.any():
        first = int(np.argmax(is_key))
        shown[:first] = False
        shown &= packets.pts >= packets.pts[first]
    keys = np.unique(packets.pts[shown])
    entries, places = np.unique(packets.pts[is_key], return_index=True)
    base = stream.time_base or Fraction(1)
    seconds = (keys - keys[:1]) * base.numerator / base.denominator
    return Timeline(keys, seconds, entries, packets.dts[is_key][places], counted=False)


def _counted(container: InputContainer, stream: VideoStream, packets: Packets) -> Timeline | None:
    """The timeline of a file without usable presentation times; None where they are usable."""
    known = packets.dts[packets.dts != UNKNOWN]
    backwards = bool((np.diff(known) < 0).any())
    if not (_is(container, "avi") or (packets.pts == UNKNOWN).any() or backwards):
        return None
    count = packets.pts.size
    if known.size == count and not backwards and stream.time_base:
        seconds = (known - known[0]) * float(stream.time_base)
    else:
        seconds = np.arange(count) / float(stream.guessed_rate or stream.average_rate or FALLBACK_RATE)
    none = np.empty(0, np.int64)
    return Timeline(np.arange(count), seconds, none, none, counted=True)


def _check_end(container: InputContainer, stream: VideoStream, packets: Packets, timeline: Timeline, name: str) -> None:
    """Refuse a file that stops before the length its header declares; a little may be missing (rounding)."""
    declared = _declared_seconds(container, stream, packets)
    end = packets.file_end if _is(container, "matroska") else packets.video_end
    indexed = _is(container, "mp4") or _is(container, "avi")
    broken_off = indexed and bool(packets.flags[-1] & CORRUPT)
    interval = float(np.median(np.diff(timeline.seconds))) if timeline.seconds.size > 1 else 0.0
    if broken_off or declared - end > max(0.25, 3 * interval):
        length = f" of {declared:.2f} s" if declared else ""
        raise VideoError(
            f"{name}: the file ends early: video up to {packets.video_end:.2f} s{length} is there; copy it again"
        )


def _declared_seconds(container: InputContainer, stream: VideoStream, packets: Packets) -> float:
    """Where the file's header says it ends; 0 where it does not.

    MP4 and MOV say it for each stream, AVI as a number of frames, one per unit of its time base, Matroska for
    the longest stream; other formats' length is ffmpeg's estimate and proves nothing. An MP4 whose edit list
    hides frames declares the list's length, which need not be there.
    """
    base = float(stream.time_base or 0)
    if _is(container, "matroska"):
        return (container.duration or 0) / 1e6  # AV_TIME_BASE is 1 us
    if _is(container, "avi"):
        return stream.frames * base
    edited = bool((packets.flags & DISCARD).any())
    return (stream.duration or 0) * base if _is(container, "mp4") and not edited else 0.0


def _is(container: InputContainer, family: str) -> bool:
    """``container.format.name`` lists names that share a demuxer: "mov,mp4,m4a,..."."""
    return family in container.format.name.split(",")
