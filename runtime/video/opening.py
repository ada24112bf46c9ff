"""A video's bytes -> an open PyAV container and its video stream, and the border where PyAV's errors end.

PyAV gets an open Python file and no protocols: a playlist or an odd path cannot make it open another file or
the network. ffmpeg's log stays off, as PyAV leaves it.

Does not interpret packets: ``timeline`` and ``decode`` do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import av
from av import Packet
from av.container import InputContainer
from av.stream import Stream
from av.video.stream import VideoStream

from runtime.errors import VideoError
from runtime.video.source import check_size

READ_SIZE = 256 * 1024  # bytes per call from ffmpeg into Python
TEXT_ART = frozenset({"adf", "bin", "idf", "tty", "xbin"})  # ffmpeg plays any text file with such a name
NO_PROTOCOLS = {"protocol_whitelist": "-"}  # not as `options`: PyAV up to 15 crashes on MPEG-PS then
ATTACHED_PICTURE = 1 << 10  # AV_DISPOSITION_ATTACHED_PIC; PyAV before 14.2 does not tell
VIDEO_MARKS = ((4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (8, b"AVI "))  # at byte: MP4 and MOV, Matroska, AVI


def open_stream(file: BinaryIO, name: str) -> tuple[InputContainer, VideoStream]:
    """Open a file from its first byte; the caller closes the container.

    Raises:
        VideoError: empty, not a video, cut off before its index, without pictures or without a decoder.
    """
    with translated(name):
        container = _container(file, name)
        try:
            return container, _video_stream(container, name)
        except VideoError:
            container.close()
            raise


def packets_from(container: InputContainer, *streams: Stream) -> Iterator[Packet[Any]]:
    """Packets of these streams, or of all, from the container's position on, the decoder's flush at the end.

    PyAV's ``demux`` raises IndexError at a packet of a stream that was not there on opening (MPEG-TS may add one).
    No such stream was asked for: a fresh ``demux`` goes on with the next packet.
    """
    while True:
        try:
            yield from container.demux(*streams)
            return
        except IndexError:
            continue


@contextmanager
def translated(name: str) -> Iterator[None]:
    """PyAV's and the file system's errors become a ``VideoError`` about ``name``."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{name}: reading the video failed ({reason(error)}), the file is damaged or ends early; copy it again"
        ) from error


def reason(error: Exception) -> str:
    """What went wrong, without number and path."""
    return str(getattr(error, "strerror", None) or error)


def _container(file: BinaryIO, name: str) -> InputContainer:
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    if not head:
        raise VideoError(f"{name}: is empty (0 bytes), expected a video; copy or download it again")
    try:
        container = av.open(
            file,
            mode="r",
            buffer_size=READ_SIZE,
            container_options=NO_PROTOCOLS,
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        if any(head.startswith(mark, at) for at, mark in VIDEO_MARKS):
            raise VideoError(
                f"{name}: a video without a readable index: the file ends early or is damaged; copy it again"
            ) from error
        raise VideoError(
            f"{name}: is not a video ({reason(error)}); expected MP4, MOV, MKV, WebM, AVI, TS or GIF"
        ) from error
    if container.format.name in TEXT_ART:
        container.close()
        raise VideoError(f"{name}: is not a video but text; expected MP4, MOV, MKV, WebM, AVI, TS or GIF")
    return container


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    """The video stream ffmpeg prefers, or the first that is not a cover picture."""
    videos = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not videos:
        kinds = ", ".join(sorted({stream.type for stream in container.streams if stream.type != "video"}))
        found = f"only {kinds}" if kinds else "nothing that plays"
        raise VideoError(f"{name}: holds no video, {found}; give a file with moving pictures")
    best = container.streams.best("video")
    stream = next((s for s in videos if best is not None and s.index == best.index), videos[0])
    if stream.codec_context is None:
        raise VideoError(f"{name}: PyAV has no decoder for its video; convert it to H.264 first")
    check_size(stream.codec_context.width, stream.codec_context.height, name)
    stream.thread_type = "AUTO"
    return stream


def _is_cover(stream: Stream) -> bool:
    disposition = getattr(stream, "disposition", None)
    return bool(getattr(disposition, "value", 0) & ATTACHED_PICTURE)
