"""What a double does for the functions of CUDA's runtime API: streams, events and graphs, on ``streams.py``'s queues.

Knows no memory.
"""

# ruff: noqa: N802, N803 - names are CUDA's

from __future__ import annotations

import itertools
from typing import Any

from tests.trt.streams import CallError, Event, Graph, Mark, Queues, Stream

__all__ = ["StreamCalls"]


class StreamCalls:
    """The queues of one device, by handles."""

    def __init__(self) -> None:
        self.queues = Queues()
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, Graph] = {}
        self.executables: dict[int, Graph] = {}
        self.module: Any = None  # cuda.bindings.runtime, set when it is made
        self._handles = itertools.count(0x5EED0000, 0x10)

    def live_handles(self) -> list[str]:
        """What was made and not yet destroyed, in words."""
        streams = [f"stream {handle:#x}" for handle in self.queues.streams if handle]
        kinds = {"event": self.events, "graph": self.graphs, "graph exec": self.executables}
        return streams + [f"{kind} {handle:#x}" for kind, held in kinds.items() for handle in held]

    def stream(self, handle: Any) -> Stream:
        """The stream of a handle: an integer, None or an object of cuda-python."""
        number = 0 if handle is None else int(handle)
        assert number in self.queues.streams, f"{number:#x} is no live stream"
        return self.queues.streams[number]

    def cudaDeviceSynchronize(self) -> None:
        if self.queues.captures:
            for capture in self.queues.captures:
                capture.broken = True
            raise CallError("cudaErrorStreamCaptureUnsupported")
        self.queues.drain_all()

    def cudaStreamCreate(self) -> Any:
        return self._new_stream(0)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._new_stream(flags)

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> Any:
        return self._new_stream(flags)

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def cudaStreamDestroy(self, stream: Any) -> None:
        found = self.stream(stream)
        assert found.handle, "the default stream is destroyed"
        assert not found.capture, "a stream is destroyed under capture"
        self.queues.drain(found)
        del self.queues.streams[found.handle]

    def cudaStreamSynchronize(self, stream: Any) -> None:
        found = self.stream(stream)
        if found.capture:
            found.capture.broken = True
            raise CallError("cudaErrorStreamCaptureUnsupported")
        self.queues.drain(found)

    def cudaStreamQuery(self, stream: Any) -> None:
        found = self.stream(stream)
        if found.capture:
            found.capture.broken = True
            raise CallError("cudaErrorStreamCaptureUnsupported")
        if found.queue:  # asking long enough helps
            self.queues.step(found)
            raise CallError("cudaErrorNotReady")

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> None:
        self.queues.wait(self.stream(stream), self._event(event))

    def cudaEventCreate(self) -> Any:
        return self.cudaEventCreateWithFlags(0)

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = next(self._handles)
        self.events[handle] = Event(handle, timing=not flags & self.module.cudaEventDisableTiming)
        return self.module.cudaEvent_t(handle)

    def cudaEventDestroy(self, event: Any) -> None:
        del self.events[self._event(event).handle]

    def cudaEventRecord(self, event: Any, stream: Any) -> None:
        self.queues.record(self._event(event), self.stream(stream))

    def cudaEventRecordWithFlags(self, event: Any, stream: Any, flags: int) -> None:
        self.cudaEventRecord(event, stream)

    def cudaEventSynchronize(self, event: Any) -> None:
        found = self._event(event)
        if found.captured:
            raise CallError("cudaErrorCapturedEvent")
        if found.mark and not found.mark.done:
            assert found.mark.stream is not None
            self.queues.drain(found.mark.stream, found.mark)

    def cudaEventQuery(self, event: Any) -> None:
        found = self._event(event)
        self.queues.refuse_unsafe()
        if found.mark and not found.mark.done:
            assert found.mark.stream is not None
            self.queues.step(found.mark.stream)
            raise CallError("cudaErrorNotReady")

    def cudaEventElapsedTime(self, start: Any, end: Any) -> float:
        marks = [self._event(start).mark, self._event(end).mark]
        if not all(self._event(event).timing for event in (start, end)) or None in marks:
            raise CallError("cudaErrorInvalidResourceHandle")
        if not all(isinstance(mark, Mark) and mark.done for mark in marks):
            raise CallError("cudaErrorNotReady")
        return 0.5

    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        self.queues.begin(self.stream(stream), mode.name)

    def cudaStreamIsCapturing(self, stream: Any) -> Any:
        capture = self.stream(stream).capture
        status = self.module.cudaStreamCaptureStatus
        if capture is None:
            return status.cudaStreamCaptureStatusNone
        return status.cudaStreamCaptureStatusInvalidated if capture.broken else status.cudaStreamCaptureStatusActive

    def cudaStreamEndCapture(self, stream: Any) -> Any:
        handle = next(self._handles)
        self.graphs[handle] = self.queues.end(self.stream(stream))
        return self.module.cudaGraph_t(handle)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        handle = next(self._handles)
        self.executables[handle] = Graph(list(self.graphs[int(graph)].work))
        return self.module.cudaGraphExec_t(handle)

    def cudaGraphInstantiateWithFlags(self, graph: Any, flags: int) -> Any:
        return self.cudaGraphInstantiate(graph, flags)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> None:
        assert int(graphExec) in self.executables, f"cudaGraphLaunch: {graphExec} is no live executable graph"
        self.queues.launch(self.executables[int(graphExec)], self.stream(stream))

    def cudaGraphUpload(self, graphExec: Any, stream: Any) -> None:
        assert int(graphExec) in self.executables, f"cudaGraphUpload: {graphExec} is no live executable graph"

    def cudaGraphDestroy(self, graph: Any) -> None:
        assert self.graphs.pop(int(graph), None), f"cudaGraphDestroy: {graph} is no live graph"

    def cudaGraphExecDestroy(self, graphExec: Any) -> None:
        assert self.executables.pop(int(graphExec), None), f"cudaGraphExecDestroy: {graphExec} is no live graph"

    def _event(self, event: Any) -> Event:
        assert int(event) in self.events, f"{event} is no live event"
        return self.events[int(event)]

    def _new_stream(self, flags: int) -> Any:
        handle = next(self._handles)
        blocking = not flags & self.module.cudaStreamNonBlocking
        self.queues.streams[handle] = Stream(handle, blocking)
        return self.module.cudaStream_t(handle)
