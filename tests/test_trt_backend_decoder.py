"""The LLM in TensorRT: its KV cache, captured steps, and what becomes of them when a step is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import runtime.kv_cache
import runtime.trt_decoder
import runtime.trt_engine
from runtime import BackendError, VideoQA
from runtime.trt_device import narrowed, widened
from tests import trt_fixtures
from tests.engines import IN_PLACE, QUESTIONS, TWO_SETS, Built, counted, on_the_cpu, tokens
from tests.trt.double import Double

built, frames, bundle = trt_fixtures.built, trt_fixtures.frames, trt_fixtures.bundle
double = trt_fixtures.clean_double


# The KV cache


@pytest.mark.parametrize("version", [TWO_SETS, IN_PLACE])
def test_a_cache_of_16_bits(
    version: str, export_bundle: Callable[..., Path], built: Built, random: np.random.Generator
) -> None:
    path = built(version, export_bundle("internvl2-phi3-a", linvt="none", dtype="float16"), sizes="tokens=256")
    with (
        Double(version=version),
        VideoQA.open(path, backend="tensorrt") as qa,
        VideoQA.open(path, backend="cpu") as cpu,
    ):
        decoders: list[Any] = [found.backend.decoder(200) for found in (qa, cpu)]
        rows = random.normal(size=(120, qa.bundle.manifest.width)).astype(np.float32)
        start = 0
        for count in (5, 1, 1, 1, 1, 100, 1, 1, 1):
            part = slice(start, start + count)
            found, expected = (decoder.step(rows[part], np.arange(120)[None, part]) for decoder in decoders)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=2e-2 * float(np.abs(expected).max()))
            start += count
        assert decoders[0].layout.dtype == "float16"


def test_bfloat16_is_rounded_as_elsewhere(random: np.random.Generator) -> None:
    values = random.normal(size=5000).astype(np.float32) * np.float32(10) ** random.integers(-38, 38, 5000)
    odd = [0, -0.0, np.inf, -np.inf, np.nan, 1 + 2**-8, 1 + 3 * 2**-8, np.finfo(np.float32).max]
    values = np.concatenate([values, np.array(odd)]).astype(np.float32)
    expected = values.astype(ml_dtypes.bfloat16)
    found = narrowed(values, "bfloat16")
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected.view(np.uint16)[number])
    np.testing.assert_array_equal(widened(found, "bfloat16"), expected.astype(np.float32))


def test_a_cache_that_grows_gives_the_same_tokens(built: Built, frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(TWO_SETS)
    expected = on_the_cpu(path, frames, QUESTIONS[:1], count=300)
    monkeypatch.setattr(runtime.kv_cache, "ANSWER_ROOM", 1)
    monkeypatch.setattr(runtime.kv_cache, "CACHE_BLOCK", 1)
    rooms: list[int] = []
    move = runtime.trt_decoder.TrtDecoder.move
    monkeypatch.setattr(
        runtime.trt_decoder.TrtDecoder,
        "move",
        lambda self, larger: (rooms.append(larger.room), move(self, larger)),
    )
    with Double(version=TWO_SETS) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            since = len(double.calls)
            answer = qa.ask(frames, QUESTIONS[0], tokens(300))
            assert [answer.token_ids] == expected
            whole = answer.prompt_tokens + 300
            wanted = [answer.prompt_tokens + 1]
            while wanted[-1] < whole:
                wanted.append(min(2 * wanted[-1], whole))
            assert rooms == wanted[1:] and len(rooms) > 2
            calls = counted(double, since)
            assert calls["cudaMemcpy2DAsync cudaMemcpyDeviceToDevice"] == len(rooms) * 2 * qa.bundle.manifest.layers
            assert calls["cudaStreamBeginCapture"] == 2 * len(rooms), "a larger cache is captured anew"
        del qa
        assert double.leaks() == []


def test_a_cache_of_one_size_is_taken_whole(built: Built, frames: Any) -> None:
    """As engines have it that write it in place."""
    path = built(IN_PLACE)
    expected = on_the_cpu(path, frames, QUESTIONS[:1], count=300)
    with Double(version=IN_PLACE), VideoQA.open(path, backend="tensorrt") as qa:
        decoder: Any = qa.backend.decoder(300)
        decoder.step(np.zeros((3, qa.bundle.manifest.width), np.float32), np.arange(3)[None])
        assert decoder.room == 512
        assert [qa.ask(frames, QUESTIONS[0], tokens(300)).token_ids] == expected


def test_a_prompt_of_one_token_and_prompts_in_pieces(bundle: Path, random: np.random.Generator) -> None:
    with VideoQA.open(bundle, backend="tensorrt") as qa, VideoQA.open(bundle, backend="cpu") as cpu:
        rows = random.normal(size=(40, qa.bundle.manifest.width)).astype(np.float32)
        decoders = [found.backend.decoder(40) for found in (qa, cpu)]
        start = 0
        for count in (1, 7, 1, 1, 1, 1, 20, 1, 1, 1):
            part = slice(start, start + count)
            found, expected = (decoder.step(rows[part], np.arange(40)[None, part]) for decoder in decoders)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            start += count
        del decoders


def test_what_an_answer_leaves_is_cleared_for_the_next(bundle: Path) -> None:
    """What is masked must be finite: a value that is not would reach every later answer."""
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        rows = np.ones((3, qa.bundle.manifest.width), np.float32)
        first = qa.backend.decoder(40)
        expected = first.step(rows, np.arange(3)[None])
        assert np.isfinite(expected).all()
        first.step(np.full((20, rows.shape[1]), np.nan, np.float32), np.arange(3, 23)[None])
        del first
        np.testing.assert_array_equal(qa.backend.decoder(40).step(rows, np.arange(3)[None]), expected)


# Captured steps


def test_steps_that_cannot_be_captured_run_all_the_same(
    double: Double, bundle: Path, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = on_the_cpu(bundle, frames)
    inner = runtime.trt_engine.TrtContext.execute

    def failing(self: Any) -> None:
        if any(stream.capture for stream in double.device.queues.streams.values()):
            raise BackendError("TensorRT does not run decode.engine")
        inner(self)

    monkeypatch.setattr(runtime.trt_engine.TrtContext, "execute", failing)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        video = qa.video(frames)
        assert [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        assert qa.backend.notes == ["decoding runs without a CUDA graph: TensorRT does not run decode.engine"]
        assert counted(double)["cudaGraphLaunch"] == 0
        del video


def test_scratch_memory_that_moves_is_captured_anew(built: Built, frames: Any) -> None:
    """A picture is asked about first, then a video, whose stages may want more."""
    path = built(TWO_SETS)
    expected = on_the_cpu(path, list(frames[:2])), on_the_cpu(path, frames)
    with Double(version=TWO_SETS), VideoQA.open(path, backend="tensorrt") as qa:
        images = qa.images(list(frames[:2]))
        found = [qa.ask(images, question, tokens(12)).token_ids for question in QUESTIONS]
        device = qa.backend.device  # type: ignore[attr-defined]
        device.reserve(device.scratch.size + 4096)
        video = qa.video(frames)
        assert (found, [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS]) == expected


# Interruptions

INTERRUPTED = {
    *("cudaMalloc", "cudaMallocHost", "cudaMemcpyAsync", "cudaMemcpy2DAsync", "cudaMemsetAsync"),
    *("cudaStreamSynchronize", "cudaEventSynchronize", "cudaEventRecord", "IExecutionContext.execute_async_v3"),
    *("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch"),
}


class Interrupts:
    """Ctrl-C at one of the next calls that take memory, ask for work or wait."""

    def __init__(self, double: Double, calls: int) -> None:
        self.inner = double.called
        self.left = calls

    def __call__(self, name: str, arguments: dict[str, Any]) -> None:
        self.inner(name, arguments)
        if name in INTERRUPTED:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_interrupt_at_any_call_frees_nothing_that_is_in_use(
    double: Double,
    bundle: Path,
    frames: Any,
    low_memory: bool,
    random: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stream's work is done late, so memory that was freed under it is found when something waits."""
    expected = on_the_cpu(bundle, frames)
    interrupted = 0
    with VideoQA.open(bundle, backend="tensorrt", low_memory=low_memory) as qa:
        for _ in range(2):  # the first opens engines
            since = len(double.calls)
            assert qa.ask(frames, QUESTIONS[0], tokens(12)).token_ids == expected[0]
        calls = sum(call.name in INTERRUPTED for call in double.calls[since:])
        for at in random.integers(1, calls + 1, 12).tolist():
            with monkeypatch.context() as patch:
                patch.setattr(double, "called", Interrupts(double, at))
                try:
                    qa.ask(frames, QUESTIONS[0], tokens(12))
                except KeyboardInterrupt:
                    interrupted += 1
            assert qa.ask(frames, QUESTIONS[1], tokens(12)).token_ids == expected[1]
            assert double.failures == []
    assert interrupted > 6


def test_an_interrupt_in_one_stream_leaves_the_other_alone(
    double: Double, bundle: Path, frames: Any, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = on_the_cpu(bundle, frames, count=30)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        video = qa.video(frames)
        for at in (1, 2, *random.integers(1, 50, 4).tolist()):
            streams = [qa.stream(video, question, tokens(30)) for question in QUESTIONS]
            for _ in range(4):
                for stream in streams:
                    next(stream)
            with monkeypatch.context() as patch:
                patch.setattr(double, "called", Interrupts(double, at))
                with pytest.raises(KeyboardInterrupt):
                    streams[0].answer  # noqa: B018  goes to the end
            del streams[0], stream
            assert streams[0].answer.token_ids == expected[1]
            assert double.failures == []
        assert [qa.ask(video, question, tokens(30)).token_ids for question in QUESTIONS] == expected
        del streams, video
