"""Frames of one stream by key, walking forward and jumping to keyframes where that saves decoding.

A jump is taken only if it lands on a keyframe at or before the frame; a container that cannot do that (ASF,
program streams) is walked from its start, once, and never asked again. A damaged packet is passed over, as
players do; the frame it took along is missed when it is asked for, not before. On the way to a frame, frames
that no other frame refers to are not decoded (a 720p H.264 clip with B-frames: 40 % less time, same frames).

Holds one decoded frame, a second only while a frame's own time differs from its packet's.

Does not convert to RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from types import TracebackType

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from runtime.video.opening import packets_from
from runtime.video.timeline import UNKNOWN, Timeline

OpenStream = Callable[[], tuple[InputContainer, VideoStream]]
Keyed = tuple[int, av.VideoFrame]

WORTH_SKIPPING = 8  # frames; a jump empties the decoder's pipeline, which costs about as many
NEARBY = 2  # frames; how far a frame's own time may lag its packet's and still be that frame


class FrameReader:
    """Decodes forward; ``frame_at`` takes ascending keys."""

    def __init__(self, open_stream: OpenStream, timeline: Timeline) -> None:
        self._open = open_stream
        self._timeline = timeline
        self._may_jump = timeline.entries.size > 0
        self._container: InputContainer | None = None
        self._frames: Iterator[Keyed] = iter(())
        self._shown: Keyed | None = None
        self._ahead: Keyed | None = None
        self._passed = UNKNOWN  # frames with keys below are not wanted
        self.damage: av.FFmpegError | None = None

    def __enter__(self) -> FrameReader:
        self._restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frames = iter(())
        self._shown = self._ahead = None
        if self._container is not None:
            self._container.close()

    def frame_at(self, key: int) -> av.VideoFrame | None:
        """The frame named ``key``, or the one just before where the decoder's times differ; None if lost."""
        if not self._timeline.counted:
            self._passed = self._key_before(key, 2 * NEARBY)
        jumped = self._jump(key)
        found = self._walk(key)
        if jumped and (found is None or found[0] != key):
            self._may_jump = False
            self._restart()
            found = self._walk(key)
        return found[1] if found is not None and self._is_frame(found[0], key) else None

    def _is_frame(self, found: int, key: int) -> bool:
        return found == key or (self.damage is None and found >= self._key_before(key, NEARBY))

    def _key_before(self, key: int, frames: int) -> int:
        place = int(np.searchsorted(self._timeline.keys, key))
        return int(self._timeline.keys[max(0, place - frames)])

    def _walk(self, key: int) -> Keyed | None:
        """The last frame at or before ``key``; looks at the next only if this one is not ``key`` itself."""
        while self._shown is None or self._shown[0] != key:
            self._ahead = self._ahead or next(self._frames, None)
            if self._ahead is None or self._ahead[0] > key:
                break
            self._shown, self._ahead = self._ahead, None
        return self._shown

    def _restart(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._stream = self._open()
        self._begin(packets_from(self._container, self._stream))
        self.damage = None

    def _begin(self, packets: Iterator[av.Packet[VideoStream]]) -> None:
        self._shown = self._ahead = None
        self._frames = self._decoded(packets)

    def _decoded(self, packets: Iterator[av.Packet[VideoStream]]) -> Iterator[Keyed]:
        count, context = 0, self._stream.codec_context
        for packet in packets:
            context.skip_frame = "NONREF" if packet.pts is not None and packet.pts < self._passed else "DEFAULT"
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                self.damage = error
                continue
            for frame in frames:
                time = frame.pts if frame.pts is not None else frame.dts
                if self._timeline.counted or time is None:
                    time = count
                count += 1
                yield time, frame

    def _jump(self, key: int) -> bool:
        """Seek to the keyframe before ``key`` if that passes over enough; True if decoding begins anew."""
        entries = self._timeline.entries
        place = int(np.searchsorted(entries, key, side="right")) - 1
        if not self._may_jump or place < 0 or self._frames_until(int(entries[place])) < WORTH_SKIPPING:
            return False
        position = self._position()
        for time in (int(entries[place]), int(self._timeline.entry_dts[place])):
            landed = None if time == UNKNOWN else self._land(time, key)
            if landed is not None:
                self._may_jump = landed > position
                return True
        self._may_jump = False
        self._restart()
        return True

    def _land(self, time: int, key: int) -> int | None:
        """Seek; the key of the keyframe landed on, or None where decoding from there would miss ``key``."""
        assert self._container is not None
        try:
            self._container.seek(time, stream=self._stream)
        except av.FFmpegError:
            return None
        packets = packets_from(self._container, self._stream)
        first = next((packet for packet in packets if packet.is_keyframe and packet.size), None)
        if first is None or first.pts is None or first.pts > key:
            return None
        self._begin(chain((first,), packets))
        return first.pts

    def _position(self) -> int:
        """Key of the furthest decoded frame; below all keys before the first."""
        furthest = self._ahead or self._shown
        return UNKNOWN if furthest is None else furthest[0]

    def _frames_until(self, key: int) -> int:
        """Frames between the position and ``key``."""
        low, high = np.searchsorted(self._timeline.keys, [self._position() + 1, key])
        return int(high - low)
