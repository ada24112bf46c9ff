"""The double of TensorRT runs engines on a CPU as TensorRT does, and finds what would go wrong in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export.lower import release_of, write_lowered
from runtime.bundle import Bundle
from tests import trt_fixtures
from tests.trt.bindings import VERSIONS
from tests.trt.double import Double
from tests.trt.play import Machine
from tests.trt.small import SHAPES, cache_graph, graph

machine = trt_fixtures.machine


@pytest.mark.parametrize("version", VERSIONS)
def test_the_demo_s_vision_stage_is_built_and_executed_and_equals_onnx_runtime(
    version: str, tmp_path: Path, random: np.random.Generator
) -> None:
    bundle = Bundle.open("demo-float")
    lowered = write_lowered(bundle.folder, "vision.onnx", release_of(version), tmp_path, plugin=False)
    with Double(version) as double:
        machine = Machine(double)
        size = bundle.manifest.stages["vision"].inputs[0].shape[1:]
        engine = machine.engine(lowered, {"pixel_values": tuple((n, *size) for n in (1, 4, 8))})
        context = engine.create_execution_context()
        session = onnxruntime.InferenceSession(str(bundle.path("vision.onnx")))
        for frames in (3, 8, 1):
            feeds = {"pixel_values": random.standard_normal((frames, *size), dtype=np.float32)}
            (found,) = machine.run(context, feeds).values()
            (expected,) = session.run(None, feeds)
            print(f"largest difference: {np.abs(found - expected).max():.2g}")
            np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
        del engine, context
        machine.close()
        assert double.leaks() == []


def test_an_engine_is_of_one_version_and_one_device(tmp_path: Path) -> None:
    with Double("10.3.0") as double:
        data = bytes(Machine(double).build(graph(tmp_path / "small.onnx"), SHAPES))
    for version, sm, change, reason in (
        ("10.9.0.34", (8, 7), data, "not compatible with this version"),
        ("10.3.0", (8, 9), data, "incompatible device"),
        ("10.3.0", (8, 7), data[:-1] + b"\0\0", "checksum"),
        ("10.3.0", (8, 7), b"garbage", "Magic tag"),
    ):
        with Double(version, sm=sm) as double:
            machine = Machine(double)
            assert machine.trt.Runtime(machine.logger).deserialize_cuda_engine(change) is None
            assert machine.lines[-1][0] == "ERROR" and reason in machine.lines[-1][1]


def test_an_engine_s_bytes_are_a_buffer_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    host = machine.build(graph(tmp_path / "small.onnx"), SHAPES)
    (tmp_path / "engine").write_bytes(host)
    assert (tmp_path / "engine").stat().st_size == host.nbytes == len(bytes(host))
    with pytest.raises(TypeError):
        len(host)
    with pytest.raises(AttributeError):
        host.decode  # noqa: B018


def test_an_engine_tells_its_tensors_and_profiles(machine: Machine, tmp_path: Path) -> None:
    engine, trt = machine.engine(graph(tmp_path / "small.onnx"), SHAPES), machine.trt
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    assert names == ["x", "y"] and engine.get_tensor_mode("y") == trt.TensorIOMode.OUTPUT
    assert tuple(engine.get_tensor_shape("x")) == (-1, 4) and engine.get_tensor_dtype("x") == trt.float32
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("x", 0)] == list(SHAPES["x"])
    assert engine.device_memory_size_v2 == engine.get_device_memory_size_for_profile_v2(0) > 0


def test_shapes_out_of_the_profile_are_refused(machine: Machine, tmp_path: Path) -> None:
    context = machine.engine(graph(tmp_path / "small.onnx"), SHAPES).create_execution_context()
    assert context.infer_shapes() == ["x"] and tuple(context.get_tensor_shape("y")) == (-1, 3)
    assert not context.set_input_shape("x", (9, 4)) and not context.set_input_shape("x", (1, 4, 1))
    assert not context.set_input_shape("z", (1, 4)) and context.infer_shapes() == ["x"]
    assert context.set_input_shape("x", (5, 4)) and context.infer_shapes() == []
    assert tuple(context.get_tensor_shape("y")) == (5, 3)


def test_execution_without_shapes_or_addresses_fails_and_says_so(machine: Machine, tmp_path: Path) -> None:
    context = machine.engine(graph(tmp_path / "small.onnx"), SHAPES).create_execution_context()
    assert context.execute_async_v3(machine.stream) is False and "shapes of ['x']" in machine.lines[-1][1]
    context.set_input_shape("x", (1, 4))
    assert context.execute_async_v3(machine.stream) is False and "address" in machine.lines[-1][1]


def test_a_second_context_must_choose_its_profile(machine: Machine, tmp_path: Path) -> None:
    engine = machine.engine(graph(tmp_path / "small.onnx"), SHAPES, {"x": ((1, 4), (1, 4), (1, 4))})
    first, second = engine.create_execution_context(), engine.create_execution_context()
    assert first.set_input_shape("x", (8, 4))
    with pytest.raises(AssertionError, match="profile"):
        second.set_input_shape("x", (1, 4))
    assert second.set_optimization_profile_async(1, machine.stream) and second.set_input_shape("x", (1, 4))
    assert not second.set_input_shape("x", (2, 4)) and not second.set_optimization_profile_async(2, machine.stream)


@pytest.mark.parametrize("fault", ["default stream", "too small", "overlap", "freed", "before", "scratch"])
def test_executions_that_would_go_wrong_in_silence_are_assertions(
    machine: Machine, tmp_path: Path, fault: str, random: np.random.Generator
) -> None:
    trt = machine.trt
    engine = machine.engine(graph(tmp_path / "small.onnx"), SHAPES)
    user = fault == "scratch"
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED if user else None
    context = engine.create_execution_context(strategy) if user else engine.create_execution_context()
    x, y = machine.memory(8 * 16), machine.memory(8 * 12 - (fault == "too small"))
    context.set_input_shape("x", (8, 4))
    context.set_tensor_address("x", x)
    context.set_tensor_address("y", x + 16 if fault == "overlap" else y)
    stream = 0 if fault == "default stream" else machine.stream
    if fault == "before":  # done only when waited for, with memory that is gone by then
        assert context.execute_async_v3(stream)
        machine.free(y)
        with pytest.raises(AssertionError, match="freed"):
            machine.finish()
        return
    if fault == "freed":
        machine.free(x)
    with pytest.raises(AssertionError):
        context.execute_async_v3(stream)
    if user:
        size = engine.device_memory_size_v2
        with pytest.raises(AssertionError, match="pass its end"):
            context.set_device_memory(machine.memory(size - 1), size)
        context.set_device_memory(machine.memory(size), size)
        assert context.execute_async_v3(stream)


def test_results_are_there_only_after_waiting(machine: Machine, tmp_path: Path) -> None:
    context = machine.engine(graph(tmp_path / "small.onnx"), SHAPES).create_execution_context()
    x, y = machine.memory(16), machine.memory(12)
    machine.write(x, np.ones((1, 4), np.float32))
    context.set_input_shape("x", (1, 4))
    context.set_tensor_address("x", x)
    context.set_tensor_address("y", y)
    assert context.execute_async_v3(machine.stream)
    assert np.isnan(machine.peek(y, (1, 3))).all()
    machine.finish()
    np.testing.assert_array_equal(machine.peek(y, (1, 3)), [[18, 22, 26]])


def test_a_graph_repeats_an_execution_at_its_addresses(machine: Machine, tmp_path: Path) -> None:
    context = machine.engine(graph(tmp_path / "small.onnx"), SHAPES).create_execution_context()
    x, y = machine.memory(16), machine.memory(12)
    context.set_input_shape("x", (1, 4))
    context.set_tensor_address("x", x)
    context.set_tensor_address("y", y)
    with pytest.raises(AssertionError, match="execution of the same profile and shapes before"):
        machine.captured(lambda: context.execute_async_v3(machine.stream))
    machine.write(x, np.zeros((1, 4), np.float32))
    assert context.execute_async_v3(machine.stream)
    launch = machine.captured(lambda: context.execute_async_v3(machine.stream))
    context.set_tensor_address("y", machine.memory(12))  # the graph keeps what it was captured with
    for number in (1, 2):
        machine.write(x, np.full((1, 4), number, np.float32))
        launch()
        machine.finish()
        np.testing.assert_array_equal(machine.peek(y, (1, 3)), [[18 * number, 22 * number, 26 * number]])


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_a_cache_is_updated_in_place_where_the_engine_says_so(version: str, tmp_path: Path) -> None:
    with Double(version) as double:
        machine = Machine(double)
        engine = machine.engine(cache_graph(tmp_path / "cache.onnx", "TensorScatter"), {})
        assert engine.get_aliased_input_tensor("present") == "past" and engine.get_aliased_input_tensor("past") is None
        context = engine.create_execution_context()
        cache, new, index = machine.memory(32), machine.memory(8), machine.memory(8)
        machine.write(cache, np.zeros((1, 1, 4, 2), np.float32))
        machine.write(new, np.full((1, 1, 1, 2), 5, np.float32))
        machine.write(index, np.array([2]))
        for name, address in (("past", cache), ("new", new), ("index", index), ("present", machine.memory(32))):
            context.set_tensor_address(name, address)
        with pytest.raises(AssertionError, match="in place"):
            context.execute_async_v3(machine.stream)
        context.set_tensor_address("present", cache)
        assert context.execute_async_v3(machine.stream)
        machine.finish()
        assert machine.peek(cache, (4, 2)).tolist() == [[0, 0], [0, 0], [5, 5], [0, 0]]
        del engine, context
        machine.close()


def test_a_cache_must_not_be_updated_in_place_where_the_engine_does_not_say_so(
    machine: Machine, tmp_path: Path
) -> None:
    context = machine.engine(cache_graph(tmp_path / "cache.onnx", "ScatterElements"), {}).create_execution_context()
    cache = machine.memory(32)
    for name, address in (
        ("past", cache),
        ("new", machine.memory(8)),
        ("index", machine.memory(8)),
        ("present", cache),
    ):
        context.set_tensor_address(name, address)
    with pytest.raises(AssertionError, match="overlaps"):
        context.execute_async_v3(machine.stream)


def test_engines_take_device_memory_and_give_it_back(machine: Machine, tmp_path: Path) -> None:
    before = machine.double.leaks()
    engine = machine.engine(graph(tmp_path / "small.onnx"), SHAPES)
    context = engine.create_execution_context()
    assert len(machine.double.engines) == len(machine.double.contexts) == 1
    del engine
    assert len(machine.double.leaks()) == len(before) + 4  # the context keeps its engine
    del context
    assert machine.double.leaks() == before


def test_scratch_memory_is_not_used_by_two_streams_at_once(machine: Machine, tmp_path: Path) -> None:
    cuda, engine = machine.cuda, machine.engine(graph(tmp_path / "small.onnx", rows=1), {})
    strategy = machine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    other = int(machine.value(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))
    size = engine.device_memory_size_v2
    scratch, contexts = machine.memory(size), [engine.create_execution_context(strategy) for _ in range(2)]
    for context in contexts:
        assert context.set_optimization_profile_async(0, machine.stream)
        context.set_device_memory(scratch, size)
        context.set_tensor_address("x", machine.memory(16))
        context.set_tensor_address("y", machine.memory(12))
    assert contexts[0].execute_async_v3(machine.stream)
    with pytest.raises(AssertionError, match="same scratch memory"):
        contexts[1].execute_async_v3(other)
    event = machine.value(cuda.cudaEventCreate())
    machine.value(cuda.cudaEventRecord(event, machine.stream))
    machine.value(cuda.cudaStreamWaitEvent(other, event, 0))
    assert contexts[1].execute_async_v3(other)
    machine.value(cuda.cudaStreamSynchronize(other))


@pytest.mark.parametrize("fault", ["deserialise", "context", "profile", "shape"])
def test_what_may_allocate_is_not_done_during_a_capture(machine: Machine, tmp_path: Path, fault: str) -> None:
    path = graph(tmp_path / "small.onnx")
    data, engine = bytes(machine.build(path, SHAPES)), machine.engine(path, SHAPES)
    context = engine.create_execution_context()
    context.set_input_shape("x", (1, 4))
    calls = {
        "deserialise": lambda: machine.trt.Runtime(machine.logger).deserialize_cuda_engine(data),
        "context": engine.create_execution_context,
        "profile": lambda: context.set_optimization_profile_async(0, machine.stream),
        "shape": lambda: context.set_input_shape("x", (2, 4)),
    }
    with pytest.raises(AssertionError, match="capture"):
        machine.captured(calls[fault])


def test_scratch_memory_is_given_as_it_is_needed(machine: Machine, tmp_path: Path) -> None:
    strategy = machine.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    engine = machine.engine(graph(tmp_path / "small.onnx"), {"x": ((1, 4), (2, 4), (64, 4))})
    size = engine.device_memory_size_v2
    scratch = machine.memory(2 * size)
    with pytest.raises(AssertionError, match="has its own"):
        engine.create_execution_context().set_device_memory(scratch, size)
    context = engine.create_execution_context(strategy)
    assert context.set_optimization_profile_async(0, machine.stream)
    with pytest.raises(AssertionError, match="aligned"):
        context.set_device_memory(scratch + 16, size)
    with pytest.raises(AssertionError, match="before all shapes"):
        context.update_device_memory_size_for_shapes()
    context.set_input_shape("x", (1, 4))
    small = context.update_device_memory_size_for_shapes()
    assert small < size
    context.set_device_memory(scratch, small)
    context.set_input_shape("x", (64, 4))
    context.set_tensor_address("x", machine.memory(64 * 16))
    context.set_tensor_address("y", machine.memory(64 * 12))
    with pytest.raises(AssertionError, match="are needed"):
        context.execute_async_v3(machine.stream)


def test_a_context_outlives_its_work_and_a_second_one_its_choice_of_profile(machine: Machine, tmp_path: Path) -> None:
    engine = machine.engine(graph(tmp_path / "small.onnx", rows=1), {})
    first, second = engine.create_execution_context(), engine.create_execution_context()
    for context in (first, second):
        context.set_tensor_address("x", machine.memory(16))
        context.set_tensor_address("y", machine.memory(12))
    with pytest.raises(AssertionError, match="before a profile"):
        second.execute_async_v3(machine.stream)
    assert first.execute_async_v3(machine.stream)
    del first, context
    with pytest.raises(AssertionError, match="gone before"):
        machine.finish()


def test_an_engine_without_weights_does_not_run(machine: Machine, tmp_path: Path) -> None:
    config = machine.builder.create_builder_config()
    config.set_flag(machine.trt.BuilderFlag.STRIP_PLAN)
    data = machine.build(graph(tmp_path / "small.onnx"), SHAPES, config=config)
    engine = machine.trt.Runtime(machine.logger).deserialize_cuda_engine(data)
    with pytest.raises(AssertionError, match="refitted"):
        engine.create_execution_context()
