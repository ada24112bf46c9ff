"""The TensorRT backend answers as ONNX Runtime does, on doubles made from the bindings of every version supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.trt_engine
from runtime import BackendError, VideoQA
from runtime.answer import Stopwatch
from tests import trt_fixtures
from tests.engines import IN_PLACE, QUESTIONS, TO_HOST, TWO_SETS, Built, counted, on_the_cpu, tokens
from tests.trt.bindings import VERSIONS
from tests.trt.double import Double

built, frames, bundle = trt_fixtures.built, trt_fixtures.frames, trt_fixtures.bundle
double = trt_fixtures.clean_double


# Answers


@pytest.mark.parametrize("source", ["demo-float", "demo"])
@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_onnx_runtimes(version: str, source: str, built: Built, frames: Any) -> None:
    path = built(version, source)
    expected = on_the_cpu(path, frames)
    with Double(version=version) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            video = qa.video(frames)
            answers = [qa.ask(video, question, tokens(12)) for question in QUESTIONS]
            in_place = qa.backend.decoder(8).layout.in_place  # type: ignore[attr-defined]
            assert qa.backend.notes == []
        assert [answer.token_ids for answer in answers] == expected
        assert set(answers[1].milliseconds) == {"prompt", "aggregate", "load", "prefill", "decode"}
        calls = counted(double)
        assert in_place is hasattr(double.trt.ICudaEngine, "get_aliased_input_tensor")
        directions = 1 if in_place else 2
        assert calls["cudaStreamBeginCapture"] == directions, "the second question replays the first one's graphs"
        assert calls["cudaGraphLaunch"] == 2 * 11 - directions, "all steps but each direction's first are replayed"
        del video, qa
        assert double.leaks() == []


@pytest.mark.parametrize("version", [TWO_SETS, IN_PLACE])
def test_answers_do_not_depend_on_when_work_is_done(
    version: str, built: Built, frames: Any, random: np.random.Generator
) -> None:
    path = built(version, "demo-float")
    expected = on_the_cpu(path, frames)
    with Double(version=version, hurry=random) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            video = qa.video(frames)
            assert [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del video, qa
        assert double.leaks() == []


def test_nothing_comes_to_the_host_between_vision_and_refine(double: Double, bundle: Path, frames: Any) -> None:
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        since = len(double.calls)
        video = qa.video(frames)
        calls = counted(double, since)
        assert calls["IExecutionContext.execute_async_v3"] == 4
        assert calls[TO_HOST] == 0
        assert calls["cudaMemcpyAsync cudaMemcpyHostToDevice"] == 3, "one copy a batch"
        with VideoQA.open(bundle, backend="cpu") as cpu:
            np.testing.assert_allclose(np.asarray(video.features), cpu.video(frames).features, atol=1e-5)
        del video


def test_a_run_is_not_waited_for_and_its_feeds_are_free_at_once(
    double: Double, bundle: Path, random: np.random.Generator
) -> None:
    pixels = random.normal(size=(5, 4, 3, 64, 64)).astype(np.float32)
    with VideoQA.open(bundle, backend="tensorrt") as qa, VideoQA.open(bundle, backend="cpu") as cpu:
        graph, watch = qa.backend.graph("vision"), Stopwatch()
        shape = np.asarray(cpu.run("vision", {"pixel_values": pixels[0]}, watch)["tokens"]).shape
        kept = qa.backend.empty((5 * shape[0], *shape[1:]))
        graph.run({"pixel_values": pixels[0]})  # the context is made
        qa.backend.finish()
        since = len(double.calls)
        for number, batch in enumerate(pixels):
            feed = batch.copy()
            graph.run({"pixel_values": feed}, {"tokens": kept[4 * number : 4 * number + 4]})
            feed[:] = np.nan
        assert counted(double, since)["cudaStreamSynchronize"] == 0
        found = np.asarray(kept)
        for number, batch in enumerate(pixels):
            expected = cpu.run("vision", {"pixel_values": batch}, watch)["tokens"]
            np.testing.assert_allclose(found[4 * number : 4 * number + 4], expected, atol=1e-5)
        del kept, graph


def test_outputs_are_written_where_they_are_wanted(bundle: Path, random: np.random.Generator) -> None:
    """Into an array of the host, and to an address that an engine does not take."""
    pixels = random.normal(size=(1, 3, 64, 64)).astype(np.float32)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        graph = qa.backend.graph("vision")
        expected = np.asarray(graph.run({"pixel_values": pixels})["tokens"])
        host = np.empty_like(expected)
        assert graph.run({"pixel_values": pixels}, {"tokens": host})["tokens"] is host
        np.testing.assert_array_equal(host, expected)
        odd = qa.backend.empty((expected.size + 1,))[1:].reshape(*expected.shape)
        assert graph.run({"pixel_values": pixels}, {"tokens": odd})["tokens"] is odd
        np.testing.assert_array_equal(np.asarray(odd), expected)
        del odd


def test_feeds_are_taken_from_any_address(double: Double, bundle: Path, random: np.random.Generator) -> None:
    tokens_of_frames = random.normal(size=(1, 4, 16, 160)).astype(np.float32)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        refine = qa.backend.graph("refine")
        expected = np.asarray(refine.run({"tokens": tokens_of_frames})["visual"])
        vision = qa.backend.graph("vision")
        odd = qa.backend.empty((tokens_of_frames.size + 1,))[1:].reshape(*tokens_of_frames.shape)
        vision.run({"pixel_values": np.ones((4, 3, 64, 64), np.float32)}, {"tokens": odd[0]})
        aligned = qa.backend.empty(tokens_of_frames.shape)
        vision.run({"pixel_values": np.ones((4, 3, 64, 64), np.float32)}, {"tokens": aligned[0]})
        found = [np.asarray(refine.run({"tokens": value})["visual"]) for value in (odd, aligned)]
        np.testing.assert_array_equal(*found)
        assert not np.array_equal(found[0], expected)
        addresses = [call.arguments["memory"] for call in double.calls if call.name.endswith("set_tensor_address")]
        assert addresses and not any(address % 256 for address in addresses), "engines were timed with aligned memory"
        del odd, aligned


def test_streams_take_turns(bundle: Path, frames: Any) -> None:
    expected = on_the_cpu(bundle, frames, count=30)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        video = qa.video(frames)
        streams = [qa.stream(video, question, tokens(30)) for question in QUESTIONS]
        for _ in range(8):
            for stream in streams:
                next(stream)
        assert [stream.answer.token_ids for stream in streams] == expected
        assert expected[0] != expected[1]
        del streams, stream, video


def test_an_abandoned_answer_leaves_no_trace(bundle: Path, frames: Any) -> None:
    expected = on_the_cpu(bundle, frames)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        video = qa.video(frames)
        abandoned = qa.stream(video, "Something else entirely?", tokens(50))
        for _ in range(5):
            next(abandoned)
        del abandoned
        assert [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del video


@pytest.mark.parametrize("count", [1, 3])
def test_pictures(bundle: Path, frames: Any, count: int) -> None:
    pictures = list(frames[:count])
    expected = on_the_cpu(bundle, pictures)
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        seen = qa.images(pictures)
        assert [qa.ask(seen, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del seen


@pytest.mark.parametrize("version", [TWO_SETS, IN_PLACE])
def test_a_bundle_without_linvt(version: str, plain_bundle: Path, built: Built, frames: Any) -> None:
    path = built(version, plain_bundle, sizes="tokens=512")
    expected = on_the_cpu(path, frames[:4, :56, :56])
    with Double(version=version) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            video = qa.video(frames[:4, :56, :56])
            assert [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del video, qa
        assert double.leaks() == []


@pytest.mark.parametrize(
    ("version", "route"), [(TWO_SETS, {}), (IN_PLACE, {}), (IN_PLACE, {"route": "video"})], ids=str
)
def test_positions_on_three_axes_and_frames_in_pairs(
    version: str, route: dict[str, str], export_bundle: Callable[..., Path], built: Built, frames: Any
) -> None:
    source = export_bundle("qwen2vl-a", linvt="none", image_size=(56, 84), **route)
    path = built(version, source, sizes="tokens=512")
    expected = on_the_cpu(path, frames[:5])
    with Double(version=version) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            assert [qa.ask(frames[:5], question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del qa
        assert double.leaks() == []


def test_a_vision_stage_of_two_inputs(export_bundle: Callable[..., Path], built: Built, frames: Any) -> None:
    """Molmo's mask travels with the frames."""
    path = built(TWO_SETS, export_bundle("molmo-a", linvt="none"), sizes="tokens=512")
    expected = on_the_cpu(path, frames[:5])
    with Double(version=TWO_SETS) as double:
        with VideoQA.open(path, backend="tensorrt") as qa:
            assert [qa.ask(frames[:5], question, tokens(12)).token_ids for question in QUESTIONS] == expected
        del qa
        assert double.leaks() == []


# Memory


def test_low_memory_holds_one_engine_at_a_time(
    double: Double, bundle: Path, frames: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = on_the_cpu(bundle, frames)
    alive: dict[str, int] = {}
    inner = runtime.trt_engine.TrtEngine.deserialized

    def opened(self: Any) -> Any:
        alive[self.record.stage] = len(double.engines)
        return inner(self)

    monkeypatch.setattr(runtime.trt_engine.TrtEngine, "deserialized", opened)
    with VideoQA.open(bundle, backend="tensorrt", low_memory=True) as qa:
        video = qa.video(frames)
        assert len(double.engines) == 1
        assert [qa.ask(video, question, tokens(12)).token_ids for question in QUESTIONS] == expected
        assert len(double.engines) == 1
        assert alive == dict.fromkeys(("vision", "refine", "aggregate", "decode"), 0)
        running = qa.stream(video, QUESTIONS[0], tokens(12))
        next(running)
        qa.video(frames)
        assert len(double.engines) == 2, "a decoder in use keeps its own"
        assert running.answer.token_ids == expected[0]
        del running, video


def test_memory_does_not_grow_with_questions(double: Double, bundle: Path, frames: Any) -> None:
    with VideoQA.open(bundle, backend="tensorrt") as qa:
        video = qa.video(frames)
        used = []
        for _ in range(4):
            qa.ask(video, QUESTIONS[0], tokens(5))
            used.append(double.device.memory.used)
        assert len(set(used)) == 1
        del video


def test_too_little_memory_is_one_line(built: Built, frames: Any) -> None:
    path = built(TWO_SETS)
    with Double(version=TWO_SETS, memory=6 << 20) as double:
        with VideoQA.open(path, backend="tensorrt") as qa, pytest.raises(BackendError) as caught:
            for _ in range(3):
                qa.ask(frames, QUESTIONS[0], tokens(5))
        assert "\n" not in str(caught.value)
        assert "memory" in str(caught.value).lower()
        del qa, caught
        assert double.leaks() == []


def test_nothing_works_after_close(bundle: Path, frames: Any) -> None:
    qa = VideoQA.open(bundle, backend="tensorrt")
    video = qa.video(frames)
    expected = np.asarray(video.features)
    qa.close()
    qa.close()
    for use in (lambda: qa.backend.graph("vision"), lambda: qa.backend.decoder(8), lambda: qa.backend.finish()):
        with pytest.raises(BackendError, match=r"^the backend is closed; open the bundle again$"):
            use()
    np.testing.assert_array_equal(np.asarray(video.features), expected)
    del video
