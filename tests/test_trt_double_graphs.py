"""The double of CUDA captures work into graphs, replays it, and refuses in a capture what CUDA refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import trt_fixtures
from tests.trt.cuda_play import SIZE, capture, down, pinned, stream_of, up, value

double, cuda = trt_fixtures.cuda_double, trt_fixtures.cuda


def test_a_captured_graph_does_nothing_until_it_is_launched_and_then_reads_the_same_addresses(cuda: Any) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    (source, wrote), (target, read) = pinned(cuda), pinned(cuda)
    read[:] = 0
    capture(cuda, stream)
    up(cuda, device, source, stream)
    down(cuda, target, device, stream)
    graph = value(cuda.cudaStreamEndCapture(stream))
    executable = value(cuda.cudaGraphInstantiate(graph, 0))
    value(cuda.cudaGraphDestroy(graph))
    value(cuda.cudaStreamSynchronize(stream))
    assert (read == 0).all()
    for number in (3, 4):
        wrote[:] = number
        value(cuda.cudaGraphLaunch(executable, stream))
        value(cuda.cudaStreamSynchronize(stream))
        assert (read == number).all()
    value(cuda.cudaGraphExecDestroy(executable))
    with pytest.raises(AssertionError, match="live"):
        cuda.cudaGraphLaunch(executable, stream)


@pytest.mark.parametrize("fault", ["malloc", "synchronise", "device", "copy", "query"])
def test_what_a_capture_does_not_allow_breaks_it(cuda: Any, fault: str) -> None:
    stream, device, (host, _) = stream_of(cuda), value(cuda.cudaMalloc(SIZE)), pinned(cuda)
    capture(cuda, stream)
    calls = {
        "malloc": lambda: cuda.cudaMalloc(SIZE),
        "synchronise": lambda: cuda.cudaStreamSynchronize(stream),
        "device": lambda: cuda.cudaDeviceSynchronize(),
        "copy": lambda: cuda.cudaMemcpy(host, device, SIZE, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost),
        "query": lambda: cuda.cudaStreamQuery(stream),
    }
    assert calls[fault]()[0] == cuda.cudaError_t.cudaErrorStreamCaptureUnsupported
    assert cuda.cudaStreamEndCapture(stream) == (cuda.cudaError_t.cudaErrorStreamCaptureInvalidated, None)
    value(cuda.cudaMemsetAsync(device, 0, SIZE, stream))
    value(cuda.cudaStreamSynchronize(stream))


def test_a_relaxed_capture_lets_others_allocate(cuda: Any) -> None:
    stream = stream_of(cuda)
    capture(cuda, stream, "Relaxed")
    value(cuda.cudaMalloc(SIZE))
    value(cuda.cudaStreamEndCapture(stream))


def test_pageable_memory_is_not_captured(cuda: Any) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    capture(cuda, stream)
    with pytest.raises(AssertionError, match="pageable"):
        up(cuda, device, np.empty(SIZE, np.uint8).ctypes.data, stream)


def test_a_stream_that_joined_a_capture_must_be_waited_for(cuda: Any) -> None:
    for joined in (True, False):
        origin, helper = stream_of(cuda), stream_of(cuda)
        device = value(cuda.cudaMalloc(SIZE))
        fork, join = value(cuda.cudaEventCreate()), value(cuda.cudaEventCreate())
        capture(cuda, origin)
        value(cuda.cudaEventRecord(fork, origin))
        value(cuda.cudaStreamWaitEvent(helper, fork, 0))
        value(cuda.cudaMemsetAsync(device, 6, SIZE, helper))
        value(cuda.cudaEventRecord(join, helper))
        if joined:
            value(cuda.cudaStreamWaitEvent(origin, join, 0))
        error, graph = cuda.cudaStreamEndCapture(origin)
        assert error.name == ("cudaSuccess" if joined else "cudaErrorStreamCaptureUnjoined")
        assert (graph is not None) is joined


def test_captures_are_begun_and_ended_in_order(cuda: Any) -> None:
    errors, (origin, helper) = cuda.cudaError_t, (stream_of(cuda), stream_of(cuda))
    mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
    fork = value(cuda.cudaEventCreate())
    assert cuda.cudaStreamEndCapture(origin)[0] == errors.cudaErrorIllegalState
    assert cuda.cudaStreamBeginCapture(0, mode)[0] == errors.cudaErrorStreamCaptureUnsupported
    capture(cuda, origin)
    assert cuda.cudaStreamBeginCapture(origin, mode)[0] == errors.cudaErrorIllegalState
    value(cuda.cudaEventRecord(fork, origin))
    assert cuda.cudaEventSynchronize(fork)[0] == errors.cudaErrorCapturedEvent
    value(cuda.cudaStreamWaitEvent(helper, fork, 0))
    assert cuda.cudaStreamEndCapture(helper)[0] == errors.cudaErrorStreamCaptureUnmatched
    with pytest.raises(AssertionError, match="under capture"):
        cuda.cudaStreamDestroy(origin)


def test_a_synchronous_copy_breaks_the_capture_of_a_blocking_stream(cuda: Any) -> None:
    stream, device, back = value(cuda.cudaStreamCreate()), value(cuda.cudaMalloc(SIZE)), np.empty(SIZE, np.uint8)
    capture(cuda, stream, "Relaxed")
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    answer = cuda.cudaMemcpy(back.ctypes.data, device, SIZE, kind)
    assert answer == (cuda.cudaError_t.cudaErrorStreamCaptureImplicit,)


def test_an_event_of_elsewhere_does_not_enter_a_capture(cuda: Any) -> None:
    stream, event = stream_of(cuda), value(cuda.cudaEventCreate())
    capture(cuda, stream)
    answer = cuda.cudaStreamWaitEvent(stream, event, 0)
    assert answer == (cuda.cudaError_t.cudaErrorStreamCaptureIsolation,)
