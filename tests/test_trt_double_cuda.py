"""The double of cuda-python keeps work until it is waited for, and refuses what CUDA refuses or would do in silence."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tests import trt_fixtures
from tests.trt.cuda_play import SIZE, down, pinned, stream_of, up, value
from tests.trt.double import Double

double, cuda = trt_fixtures.cuda_double, trt_fixtures.cuda


def test_modules_come_and_go() -> None:
    before = {name for name in sys.modules if name.split(".")[0] in ("tensorrt", "cuda")}
    with Double("10.9.0.34"):
        import tensorrt
        from cuda.bindings import driver, runtime

        assert tensorrt.__version__ == "10.9.0.34"
        assert runtime.cudaMalloc and driver.cuLaunchKernel
    assert {name for name in sys.modules if name.split(".")[0] in ("tensorrt", "cuda")} == before


def test_the_old_names_of_cuda_python_are_there_when_asked_for() -> None:
    with Double("10.3.0", old_cuda=True):
        from cuda import cuda, cudart

        assert value(cudart.cudaGetDeviceCount()) == 1 and cuda.CUresult.CUDA_SUCCESS == 0
        with pytest.raises(ImportError):
            from cuda.bindings import runtime  # noqa: F401


def test_the_device_is_the_one_that_was_asked_for(cuda: Any, double: Double) -> None:
    attributes = cuda.cudaDeviceAttr
    properties = value(cuda.cudaGetDeviceProperties(0))
    assert properties.name.rstrip(b"\0") == b"Orin" and properties.totalGlobalMem == 8 << 30
    assert value(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrComputeCapabilityMajor, 0)) == 8
    assert value(cuda.cudaDeviceGetAttribute(attributes.cudaDevAttrIntegrated, 0)) == 1
    free, total = cuda.cudaMemGetInfo()[1:]
    value(cuda.cudaMalloc(1 << 20))
    assert total == free == 8 << 30 and cuda.cudaMemGetInfo()[1] == free - (1 << 20)
    assert cuda.cudaGetDeviceProperties(1)[0] == cuda.cudaError_t.cudaErrorInvalidDevice


def test_names_and_arguments_that_cuda_lacks_are_refused(cuda: Any) -> None:
    with pytest.raises(AttributeError):
        cuda.cudaMallocEverything(1)
    with pytest.raises(TypeError):
        cuda.cudaMalloc(1, 2)
    with pytest.raises(TypeError):
        cuda.cudaMalloc(1.5)
    with pytest.raises(TypeError):
        cuda.cudaMalloc(bytes=1)
    with pytest.raises(TypeError):
        cuda.cudaMemcpyAsync(0, 0, 1, 1, 0)  # the kind is an enum's value, not an integer


def test_a_copy_is_not_done_before_it_is_waited_for(cuda: Any, random: np.random.Generator) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    (source, wrote), (target, read) = pinned(cuda), pinned(cuda)
    wrote[:] = random.integers(0, 256, SIZE)
    expected = wrote.copy()
    up(cuda, device, source, stream)
    down(cuda, target, device, stream)
    assert not np.array_equal(read, expected)
    value(cuda.cudaStreamSynchronize(stream))
    np.testing.assert_array_equal(read, expected)


def test_who_overwrites_pinned_memory_too_early_uploads_the_wrong_bytes(cuda: Any) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    source, wrote = pinned(cuda)
    wrote[:] = 1
    up(cuda, device, source, stream)
    wrote[:] = 2
    target, read = pinned(cuda)
    down(cuda, target, device, stream)
    value(cuda.cudaStreamSynchronize(stream))
    assert (read == 2).all()


def test_pageable_memory_was_read_when_the_call_returns_and_is_written_when_it_does(cuda: Any) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    array, back = np.full(SIZE, 7, np.uint8), np.zeros(SIZE, np.uint8)
    up(cuda, device, array.ctypes.data, stream)
    array[:] = 9
    down(cuda, back.ctypes.data, device, stream)
    assert (back == 7).all()


def test_a_synchronous_copy_waits_for_blocking_streams_alone(cuda: Any) -> None:
    blocking, other = value(cuda.cudaStreamCreate()), stream_of(cuda)
    back = np.zeros(SIZE, np.uint8)
    for stream, expected in ((blocking, 5), (other, 0xFF)):
        device = value(cuda.cudaMalloc(SIZE))
        value(cuda.cudaMemsetAsync(device, 5, SIZE, stream))
        value(cuda.cudaMemcpy(back.ctypes.data, device, SIZE, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost))
        assert (back == expected).all()


def test_rows_are_copied_with_their_pitches(cuda: Any, random: np.random.Generator) -> None:
    stream = stream_of(cuda)
    source, target = value(cuda.cudaMalloc(8 * 16)), value(cuda.cudaMalloc(8 * 24))
    rows = random.integers(0, 255, (8, 16), dtype=np.uint8)
    up(cuda, source, rows.ctypes.data, stream, rows.nbytes)
    kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    value(cuda.cudaMemcpy2DAsync(target, 24, source, 16, 10, 8, kind, stream))
    back = np.empty((8, 24), np.uint8)
    down(cuda, back.ctypes.data, target, stream, back.nbytes)
    np.testing.assert_array_equal(back[:, :10], rows[:, :10])
    assert (back[:, 10:] == 0xFF).all()
    with pytest.raises(AssertionError, match="pass its end"):
        cuda.cudaMemcpy2DAsync(target, 24, source, 16, 16, 9, kind, stream)


def test_an_event_lets_another_stream_come_so_far_and_no_further(cuda: Any) -> None:
    first, second = stream_of(cuda), stream_of(cuda)
    device = value(cuda.cudaMalloc(SIZE))
    event = value(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
    target, read = pinned(cuda)
    value(cuda.cudaMemsetAsync(device, 1, SIZE, first))
    value(cuda.cudaEventRecord(event, first))
    value(cuda.cudaMemsetAsync(device, 2, SIZE, first))
    assert cuda.cudaEventQuery(event) == (cuda.cudaError_t.cudaErrorNotReady,)
    value(cuda.cudaStreamWaitEvent(second, event, 0))
    down(cuda, target, device, second)
    value(cuda.cudaStreamSynchronize(second))
    assert (read == 1).all()
    assert cuda.cudaEventQuery(event) == (cuda.cudaError_t.cudaSuccess,)
    value(cuda.cudaDeviceSynchronize())
    down(cuda, target, device, second)
    value(cuda.cudaEventRecord(event, second))
    value(cuda.cudaEventSynchronize(event))
    assert (read == 2).all()


@pytest.mark.parametrize("fault", ["double free", "inside", "freed", "foreign", "end", "pinned as device", "stream"])
def test_misuse_of_memory_is_an_assertion_that_names_the_call(cuda: Any, double: Double, fault: str) -> None:
    stream, device, (host, _) = stream_of(cuda), value(cuda.cudaMalloc(SIZE)), pinned(cuda)
    with pytest.raises(AssertionError, match=r"cuda|stream"):
        if fault == "double free":
            value(cuda.cudaFree(device))
            cuda.cudaFree(device)
        elif fault == "inside":
            cuda.cudaFree(device + 1)
        elif fault == "freed":
            value(cuda.cudaFree(device))
            cuda.cudaMemsetAsync(device, 0, SIZE, stream)
        elif fault == "foreign":
            cuda.cudaMemsetAsync(np.empty(SIZE, np.uint8).ctypes.data, 0, SIZE, stream)
        elif fault == "end":
            cuda.cudaMemsetAsync(device + 1, 0, SIZE, stream)
        elif fault == "pinned as device":
            cuda.cudaFree(host)
        else:
            cuda.cudaStreamSynchronize(int(stream) + 1)
    assert double.failures


def test_memory_that_is_freed_before_its_work_was_done_is_found(cuda: Any) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    value(cuda.cudaMemsetAsync(device, 0, SIZE, stream))
    value(cuda.cudaFree(device))
    with pytest.raises(AssertionError, match="freed"):
        cuda.cudaStreamSynchronize(stream)


def test_misuse_that_nobody_saw_fails_at_the_end() -> None:
    def hide() -> None:
        with Double() as double:
            from cuda.bindings import runtime

            with pytest.raises(AssertionError):
                runtime.cudaFree(1)
            assert double.failures

    with pytest.raises(AssertionError, match="nobody saw"):
        hide()


def test_memory_ends(cuda: Any) -> None:
    answer = cuda.cudaMalloc((8 << 30) + 1)
    assert answer == (cuda.cudaError_t.cudaErrorMemoryAllocation, None)


def test_host_memory_counts_where_it_is_the_device_s_too() -> None:
    for integrated, expected in ((True, 2), (False, 0)):
        with Double(memory=64 << 10, integrated=integrated):
            from cuda.bindings import runtime

            address = value(runtime.cudaMalloc(40 << 10))
            assert int(runtime.cudaMallocHost(40 << 10)[0]) == expected
            value(runtime.cudaFree(address))


def test_leaks_are_told_in_words(cuda: Any, double: Double) -> None:
    stream, device = stream_of(cuda), value(cuda.cudaMalloc(SIZE))
    event = value(cuda.cudaEventCreate())
    assert len(double.leaks()) == 3
    assert any("1024 bytes of device memory by cudaMalloc" in line for line in double.leaks())
    value(cuda.cudaFree(device))
    value(cuda.cudaStreamDestroy(stream))
    value(cuda.cudaEventDestroy(event))
    assert double.leaks() == []


def test_numpy_s_integers_are_no_addresses(cuda: Any) -> None:
    device = value(cuda.cudaMalloc(SIZE))
    with pytest.raises(AssertionError, match="NumPy"):
        cuda.cudaFree(np.uint64(device))


def test_times_are_those_of_events_that_keep_time_and_are_over(cuda: Any) -> None:
    stream, errors = stream_of(cuda), cuda.cudaError_t
    first, second = value(cuda.cudaEventCreate()), value(cuda.cudaEventCreate())
    timeless = value(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
    assert cuda.cudaEventElapsedTime(first, second)[0] == errors.cudaErrorInvalidResourceHandle
    for event in (first, second, timeless):
        value(cuda.cudaEventRecord(event, stream))
    assert cuda.cudaEventElapsedTime(first, second)[0] == errors.cudaErrorNotReady
    assert cuda.cudaEventElapsedTime(first, timeless)[0] == errors.cudaErrorInvalidResourceHandle
    assert cuda.cudaStreamQuery(stream)[0] == errors.cudaErrorNotReady
    value(cuda.cudaStreamSynchronize(stream))
    assert value(cuda.cudaEventElapsedTime(first, second)) > 0 and value(cuda.cudaStreamQuery(stream)) is None


@pytest.mark.parametrize("fault", ["default stream", "event", "graph", "graph exec", "direction", "pitch"])
def test_other_misuse_is_an_assertion_too(cuda: Any, fault: str) -> None:
    stream, device, kinds = stream_of(cuda), value(cuda.cudaMalloc(SIZE)), cuda.cudaMemcpyKind
    calls = {
        "default stream": lambda: cuda.cudaStreamDestroy(0),
        "event": lambda: cuda.cudaEventRecord(1, stream),
        "graph": lambda: cuda.cudaGraphDestroy(cuda.cudaGraph_t(1)),
        "graph exec": lambda: cuda.cudaGraphExecDestroy(cuda.cudaGraphExec_t(1)),
        "direction": lambda: cuda.cudaMemcpyAsync(device, device, 1, kinds.cudaMemcpyDefault, stream),
        "pitch": lambda: cuda.cudaMemset2DAsync(device, 4, 0, 8, 4, stream),
    }
    with pytest.raises(AssertionError):
        calls[fault]()


def test_work_is_done_sooner_when_the_double_is_in_a_hurry(random: np.random.Generator) -> None:
    seen = set()
    for _ in range(20):
        with Double(hurry=random):
            from cuda.bindings import runtime

            stream, device = stream_of(runtime), value(runtime.cudaMalloc(SIZE))
            target, read = pinned(runtime)
            value(runtime.cudaMemsetAsync(device, 1, SIZE, stream))
            down(runtime, target, device, stream)
            for _ in range(2):
                runtime.cudaMemGetInfo()
            seen.add(bool((read == 1).all()))
            value(runtime.cudaStreamSynchronize(stream))
            assert (read == 1).all()
    assert seen == {True, False}


def test_copies_go_the_way_they_say(cuda: Any) -> None:
    stream, device, (host, _) = stream_of(cuda), value(cuda.cudaMalloc(SIZE)), pinned(cuda)
    with pytest.raises(AssertionError, match="expected device memory"):
        up(cuda, host, host, stream)
    with pytest.raises(AssertionError, match="expected pinned memory"):
        up(cuda, device, device, stream)
    value(cuda.cudaFreeHost(host))
    with pytest.raises(AssertionError, match="which was freed: cudaMallocHost"):
        up(cuda, device, host, stream)
