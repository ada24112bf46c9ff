"""What TensorRT says in its log reaches the user: warnings as notes, reasons in errors, with advice that fits them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.engines
from runtime import BackendError, VideoQA
from runtime.trt_device import translated
from runtime.trt_log import Log, capturing
from tests.engines import QUESTIONS, Built, tokens
from tests.trt.double import Double
from tests.trt.run_side import ContextBehaviour, EngineBehaviour, RuntimeBehaviour

VERSION = "10.3.0"
USE_LESS = "use fewer frames or tokens, or --low-memory"
RAISE, WORK = "raise", "work"
REBUILD = "run: python -m export.build "


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Built(tmp_path_factory)(VERSION)


@pytest.fixture
def double() -> Iterator[Double]:
    with Double(version=VERSION) as double:
        yield double
        assert double.leaks() == []


def saying(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, severity: str, text: str, then: Any) -> None:
    """Have a method of the double say something, and ``then`` give this, raise (RAISE) or do what it does (WORK)."""
    inner = getattr(kind, method)

    def said(self: Any, *given: Any, **more: Any) -> Any:
        engine = getattr(self, "engine", self)
        self.world.log(self.logger if isinstance(self, RuntimeBehaviour) else engine.runtime.logger, severity, text)
        if then == RAISE:
            raise RuntimeError("nobody knows")
        return inner(self, *given, **more) if then == WORK else then

    monkeypatch.setattr(kind, method, said)


@pytest.mark.usefixtures("double")
def test_warnings_about_an_engine_are_noted_once(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, random: np.random.Generator
) -> None:
    text = "Using an engine plan file across different models of devices\nis not recommended."
    saying(monkeypatch, RuntimeBehaviour, "deserialize_cuda_engine", "WARNING", text, WORK)
    frames = random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with VideoQA.open(bundle, backend="tensorrt", low_memory=True) as qa:
        for _ in range(2):
            qa.ask(frames, QUESTIONS[0], tokens(3))
        assert qa.backend.notes == [
            f"TensorRT says of {stage}.engine: {' '.join(text.split())}"
            for stage in ("vision", "refine", "aggregate", "decode")
        ]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("kind", "method", "then", "found"),
    [
        (RuntimeBehaviour, "deserialize_cuda_engine", None, "TensorRT does not take "),
        (EngineBehaviour, "create_execution_context", None, "TensorRT makes no context of vision.engine: "),
        (
            ContextBehaviour,
            "set_tensor_address",
            False,
            "takes no address for pixel_values of vision.engine: ",
        ),
        (ContextBehaviour, "execute_async_v3", False, "TensorRT does not run vision.engine: "),
        (ContextBehaviour, "execute_async_v3", RAISE, "failed to run vision: nobody knows"),
        (EngineBehaviour, "create_execution_context", RAISE, "failed to open vision.engine: "),
    ],
)
@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 4096 bytes.)", USE_LESS),
        ("[defaultAllocator.cpp::allocate] Error Code 1: Cuda Runtime (out of memory)", USE_LESS),
        ("Error Code 1: Cuda Runtime (an illegal memory access was encountered)", ""),
    ],
)
def test_reasons_are_told_with_advice_that_fits(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    method: str,
    then: Any,
    found: str,
    text: str,
    advice: str,
) -> None:
    saying(monkeypatch, kind, method, "ERROR", text, then)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        with pytest.raises(BackendError) as caught:
            qa.backend.graph("vision").run({"pixel_values": np.zeros((1, 3, 64, 64), np.float32)})
        line = str(caught.value)
        del caught
    otherwise = "run python -m runtime.inspect on the bundle" if then == RAISE else REBUILD
    assert found in line and text in line, line
    assert (advice or otherwise) in line.split(text)[1] and "\n" not in line, line


def test_what_was_said_about_something_else_is_not_the_reason(
    double: Double, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        graph: Any = qa.backend.graph("vision")
        double.log(graph.engine.device.log.logger, "ERROR", "long ago")
        monkeypatch.setattr(EngineBehaviour, "create_execution_context", lambda self, strategy: None)
        with pytest.raises(BackendError, match=r"vision\.engine: TensorRT gave no reason; run: python"):
            graph.run({"pixel_values": np.zeros((1, 3, 64, 64), np.float32)})
        del graph


def test_there_is_one_logger_for_the_process_and_it_outlives_backends(double: Double, bundle: Path) -> None:
    loggers = []
    for _ in range(2):
        with VideoQA.open(bundle, backend="tensorrt") as first, VideoQA.open(bundle, backend="tensorrt") as second:
            logs: list[Log] = [qa.backend.device.log for qa in (first, second)]  # type: ignore[attr-defined]
            double.log(logs[0].logger, "ERROR", "heard by all")
            assert [log.reason() for log in logs] == ["heard by all"] * 2
            loggers += [log.logger for log in logs]
        del first, second, logs
    assert len({id(logger) for logger in loggers}) == 1
    gc.collect()
    log = capturing(double.trt)
    assert log.logger is loggers[0] and len(loggers[0].logs) == 1, "logs that are gone are forgotten"


def test_a_log_is_read_while_other_threads_write(double: Double) -> None:
    log = capturing(double.trt)
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            double.log(log.logger, "WARNING", "one of many")

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2000):
            assert log.reason() in ("one of many", "TensorRT gave no reason")
            assert log.warnings() in (["one of many"], [])
            assert log.error() == ""
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_errors_without_a_log_are_told_as_they_are() -> None:
    said = r"^TensorRT failed to compute: odd; run python -m runtime.inspect"
    with pytest.raises(BackendError, match=said), translated("compute"):
        raise RuntimeError("odd")


@pytest.mark.parametrize("name", ["auto", "tensorrt"])
def test_engines_are_compared_once(double: Double, bundle: Path, name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    inner = runtime.engines.graph_hash
    monkeypatch.setattr(
        runtime.engines, "graph_hash", lambda opened, stage: hashed.append(stage) or inner(opened, stage)
    )
    since = len(double.calls)
    VideoQA.open(bundle, backend=name).close()
    assert sorted(hashed) == ["aggregate", "decode", "refine", "vision"]
    assert sum(call.name == "cudaGetDeviceProperties" for call in double.calls[since:]) == 1
