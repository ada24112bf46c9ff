"""Streams, events and graphs of a double: work is queued, done in order when something waits for it, or captured.

Nothing is done earlier than it must be (unless ``hurry`` is asked to), so that whoever reads a result before waiting,
or overwrites a source too early, gets wrong values. A wait for an event of another stream lets that stream come so far
and no further.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

__all__ = ["CallError", "Capture", "Event", "Graph", "Queues", "Stream", "Work"]


class CallError(Exception):
    """CUDA's answer is an error; ``name`` is its name in CUDA's enum."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(eq=False)
class Work:
    """One thing to do; ``what`` is the call that asked for it."""

    what: str
    run: Callable[[], None]
    waits_for: Mark | None = None
    marks: Mark | None = None


@dataclass(eq=False)
class Mark:
    """One recording of an event."""

    stream: Stream | None
    done: bool = False


@dataclass(eq=False)
class Event:
    """An event, and its newest mark."""

    handle: int
    timing: bool
    mark: Mark | None = None
    captured: tuple[Capture, Stream, int] | None = None  # where in a capture it was recorded


@dataclass(eq=False)
class Graph:
    """Captured work, in order."""

    work: list[Work]


@dataclass(eq=False)
class Capture:
    """A capture under way."""

    origin: Stream
    mode: str
    thread: int = field(default_factory=threading.get_ident)
    work: list[Work] = field(default_factory=list)
    joined: dict[Stream, int] = field(default_factory=dict)  # stream -> length of ``work`` after its newest piece
    seen: dict[Stream, int] = field(default_factory=dict)  # stream -> how much of it the origin waited for
    broken: bool = False


@dataclass(eq=False)
class Stream:
    """A queue; handle 0 is the default stream."""

    handle: int
    blocking: bool  # waits for the default stream
    queue: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None


class Queues:
    """All streams of one device."""

    def __init__(self) -> None:
        self.default = Stream(0, True)
        self.streams: dict[int, Stream] = {0: self.default}
        self.done: list[str] = []  # what was executed, in order

    def enqueue(self, stream: Stream, what: str, run: Callable[[], None]) -> Work:
        """Ask for work; under capture it is recorded instead."""
        if stream.capture:
            stream.capture.work.append(Work(what, run))
            stream.capture.joined[stream] = len(stream.capture.work)
            return stream.capture.work[-1]
        if stream is self.default:  # legacy: behind everything asked of blocking streams
            for other in self.streams.values():
                if other.blocking and other is not stream and other.queue:
                    mark = Mark(other)
                    other.queue.append(Work("default stream", lambda: None, marks=mark))
                    stream.queue.append(Work("default stream", lambda: None, waits_for=mark))
        stream.queue.append(Work(what, run))
        return stream.queue[-1]

    def record(self, event: Event, stream: Stream) -> None:
        """``cudaEventRecord``."""
        if stream.capture:
            event.captured = (stream.capture, stream, stream.capture.joined.get(stream, 0))
            return
        event.captured = None
        event.mark = Mark(stream)
        stream.queue.append(Work("cudaEventRecord", lambda: None, marks=event.mark))

    def wait(self, stream: Stream, event: Event) -> None:
        """``cudaStreamWaitEvent``; a stream that waits for a captured event joins the capture."""
        if event.captured:
            capture, source, place = event.captured
            if stream.capture is None:
                stream.capture = capture
                capture.joined[stream] = len(capture.work)
                capture.seen[stream] = -1
            if stream is capture.origin:
                capture.seen[source] = place
            return
        if stream.capture is not None:
            stream.capture.broken = True
            raise CallError("cudaErrorStreamCaptureIsolation")
        if event.mark is not None and not event.mark.done:
            stream.queue.append(Work("cudaStreamWaitEvent", lambda: None, waits_for=event.mark))

    def drain(self, stream: Stream, until: Mark | None = None) -> None:
        """Do a stream's work in order, all of it or up to a mark."""
        while stream.queue and not (until and until.done):
            self.step(stream)
        assert not (until and not until.done), "an event is waited for whose record was lost"

    def step(self, stream: Stream) -> None:
        """Do the oldest piece of work of a stream."""
        work = stream.queue[0]
        if work.waits_for and not work.waits_for.done:
            assert work.waits_for.stream is not None
            assert work.waits_for.stream is not stream, "a stream waits for itself"
            self.drain(work.waits_for.stream, work.waits_for)
        stream.queue.popleft()
        self.perform(work)

    def perform(self, work: Work) -> None:
        """Do one piece of work."""
        work.run()
        self.done.append(work.what)
        if work.marks:
            work.marks.done = True

    def hurry(self, random: np.random.Generator) -> None:
        """Do some of what was asked, as a device does that does not wait to be waited for."""
        for stream in list(self.streams.values()):
            while stream.queue and random.random() < 0.5:
                self.step(stream)

    def is_behind(self, stream: Stream, work: Work, other: Stream) -> bool:
        """Whether what is asked of ``stream`` now comes after a piece of work of another stream."""
        if work not in other.queue:
            return True
        after = list(other.queue)[other.queue.index(work) :]
        marks = {later.marks for later in after if later.marks}
        return any(waiting.waits_for in marks for waiting in stream.queue if waiting.waits_for)

    def drain_all(self) -> None:
        """``cudaDeviceSynchronize``."""
        for stream in list(self.streams.values()):
            self.drain(stream)

    @property
    def captures(self) -> list[Capture]:
        """Captures under way."""
        return list({stream.capture for stream in self.streams.values() if stream.capture})

    def begin(self, stream: Stream, mode: str) -> None:
        """``cudaStreamBeginCapture``."""
        if stream is self.default:
            raise CallError("cudaErrorStreamCaptureUnsupported")
        if stream.capture:
            raise CallError("cudaErrorIllegalState")
        stream.capture = Capture(stream, mode)
        stream.capture.joined[stream] = 0

    def end(self, stream: Stream) -> Graph:
        """``cudaStreamEndCapture``; the streams are usable afterwards, whatever became of it."""
        capture = stream.capture
        if capture is None:
            raise CallError("cudaErrorIllegalState")
        if capture.origin is not stream:
            raise CallError("cudaErrorStreamCaptureUnmatched")
        for member in capture.joined:
            member.capture = None
        if capture.broken:
            raise CallError("cudaErrorStreamCaptureInvalidated")
        if any(capture.seen.get(s, 0) < end for s, end in capture.joined.items() if s is not stream):
            raise CallError("cudaErrorStreamCaptureUnjoined")
        return Graph(capture.work)

    def launch(self, graph: Graph, stream: Stream) -> None:
        """``cudaGraphLaunch``: all of it, in order, as one piece of work."""

        def run() -> None:
            for work in graph.work:
                self.perform(work)

        self.enqueue(stream, "cudaGraphLaunch", run)

    def refuse_unsafe(self) -> None:
        """A call that may wait or allocate, made while something is captured."""
        for capture in self.captures:
            elsewhere = capture.mode == "cudaStreamCaptureModeThreadLocal" and capture.thread != threading.get_ident()
            if capture.mode != "cudaStreamCaptureModeRelaxed" and not elsewhere:
                capture.broken = True
                raise CallError("cudaErrorStreamCaptureUnsupported")
