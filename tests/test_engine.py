"""``VideoQA``: the recorded tokens come out, a kept video costs nothing again, and every end of an answer is sound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.backend_ort
import runtime.engine
import runtime.kv_cache
import runtime.ort_provider
from runtime import Answer, BackendError, GenerationOptions, LinvtError, OptionError, QuestionError, Video, VideoQA
from runtime.answer import Stopwatch
from runtime.backend import Backend, Decoder, Graph, Tensor, open_backend
from tests.bundles import forge, replaced
from tests.videos import write_video

QUESTION = "What happens?"
Recorded = Callable[[str], dict[str, Any]]


def tokens(count: int) -> GenerationOptions:
    """So many tokens, whatever they are."""
    return GenerationOptions(max_new_tokens=count, ignore_eos=True)


@pytest.fixture(scope="module")
def frames(recorded: Recorded) -> Any:
    """(6, 50, 72, 3) uint8."""
    return recorded("linvt-internvl2-a")["frames_u8"]


@pytest.fixture(scope="module")
def qa(linvt_bundle: Path) -> Iterator[VideoQA]:
    """An opened bundle; no test closes it."""
    with VideoQA.open(linvt_bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def video(qa: VideoQA, frames: Any) -> Video:
    """The recorded frames, seen."""
    return qa.video(frames)


# The recorded answers


def test_the_original_codes_tokens(qa: VideoQA, video: Video, recorded: Recorded) -> None:
    expected = recorded("linvt-internvl2-a")
    answer = qa.ask(video, str(expected["question"]), tokens(16))
    assert answer.token_ids == tuple(expected["chat_greedy_ids"].tolist())
    assert answer.prompt_tokens == expected["chat_input_ids"].shape[1]
    assert answer.finish_reason == "length"


def test_the_plain_models_tokens(plain_bundle: Path, recorded: Recorded) -> None:
    expected = recorded("internvl2-qwen2-a")
    question = str(expected["question"]).splitlines()[-1]
    with VideoQA.open(plain_bundle) as plain:
        answer = plain.ask(expected["frames_u8"], question, tokens(16))
        assert answer.token_ids == tuple(expected["greedy_ids"].tolist())
        assert answer.prompt_tokens == expected["input_ids"].shape[1]
        stopped = plain.ask(expected["frames_u8"], question, GenerationOptions(max_new_tokens=16))
    assert stopped.token_ids == answer.token_ids[:10]  # the eleventh is <|im_end|>
    assert stopped.finish_reason == "stop"
    assert not {"refine", "aggregate"} & stopped.milliseconds.keys()


@pytest.mark.parametrize("at", [0, 5, 15])
def test_a_stop_token_ends_an_answer(linvt_bundle: Path, tmp_path: Path, recorded: Recorded, at: int) -> None:
    expected = recorded("linvt-internvl2-a")
    ids = expected["chat_greedy_ids"].tolist()
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=replaced("prompt/stop_ids", [ids[at]]))
    with VideoQA.open(bundle) as qa:
        answer = qa.ask(expected["frames_u8"], str(expected["question"]), GenerationOptions(max_new_tokens=16))
        whole = qa.ask(expected["frames_u8"], str(expected["question"]), tokens(16))
    assert answer.token_ids == tuple(ids[:at])
    assert answer.finish_reason == "stop"
    assert answer.tokens_per_second > 0 or at == 0
    assert answer.first_token_ms > 0
    assert whole.token_ids == tuple(ids)


# What a video costs, and what a second question costs


class CountingBackend:
    """A backend that counts runs per stage."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name, self.reason, self.notes, self.limits = inner.name, inner.reason, inner.notes, inner.limits
        self.runs: dict[str, int] = {}

    def graph(self, stage: str) -> Graph:
        self.runs[stage] = self.runs.get(stage, 0) + 1
        return self.inner.graph(stage)

    def decoder(self, capacity: int) -> Decoder:
        self.runs["decode"] = self.runs.get("decode", 0) + 1
        return self.inner.decoder(capacity)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        return self.inner.empty(shape)

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()


def test_a_second_question_skips_decoding_vision_and_refine(
    linvt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    opened = []
    monkeypatch.setattr(runtime.engine, "open_source", lambda source: opened.append(source) or source_of(source))
    source_of = runtime.video.open_source
    with VideoQA.open(linvt_bundle) as qa:
        counting = CountingBackend(open_backend(qa.bundle, "cpu"))
        qa.backend = counting
        video = qa.video(clip, frames=6)
        assert (opened, counting.runs) == ([clip], {"vision": 2, "refine": 1})
        clip.unlink()
        first = qa.ask(video, QUESTION, tokens(4))
        second = qa.ask(video, "Who is there?", tokens(4))
    assert (opened, counting.runs) == ([clip], {"vision": 2, "refine": 1, "aggregate": 2, "decode": 2})
    for answer in (first, second):
        assert set(answer.milliseconds) == {"prompt", "aggregate", "load", "prefill", "decode"}
        assert 0 < answer.first_token_ms <= sum(answer.milliseconds.values())
        assert answer.frame_timestamps == tuple(video.timestamps.tolist())


def test_only_what_questions_need_is_kept(qa: VideoQA, video: Video) -> None:
    assert video.features.shape == (1, 21, 48)
    assert video.frames == 6
    assert video.bundle == qa.bundle.identity


def test_frames_are_decoded_batch_by_batch(qa: VideoQA, frames: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    inner = runtime.engine.vision_feeds
    monkeypatch.setattr(
        runtime.engine, "vision_feeds", lambda batch, spec: batches.append(len(batch)) or inner(batch, spec)
    )
    qa.video(frames, frames=10)
    assert batches == [4, 4, 2]


def test_a_video_is_asked_about_without_being_kept(qa: VideoQA, video: Video, frames: Any) -> None:
    answer = qa.ask(frames, QUESTION, tokens(4))
    assert answer.token_ids == qa.ask(video, QUESTION, tokens(4)).token_ids
    assert {"decode_video", "preprocess", "vision", "refine", "aggregate"} <= answer.milliseconds.keys()


def test_stages_add_up_to_the_wall_clock(linvt_bundle: Path, tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4")
    with VideoQA.open(linvt_bundle) as qa:
        begin = time.perf_counter()
        answer = qa.ask(str(clip), QUESTION, tokens(64))
        wall = 1000 * (time.perf_counter() - begin)
    total = sum(answer.milliseconds.values())
    print(f"stages {total:.0f} ms of {wall:.0f} ms: {answer.milliseconds}")
    assert 0.5 * wall < total <= wall
    assert all(took >= 0 for took in answer.milliseconds.values())
    assert answer.first_token_ms == pytest.approx(total - answer.milliseconds["decode"])
    assert answer.tokens_per_second == pytest.approx(63 / (answer.milliseconds["decode"] / 1000))


def test_a_stage_inside_another_counts_for_itself() -> None:
    watch = Stopwatch()
    with watch("outer"):
        with watch("inner"):
            time.sleep(0.02)
        with watch("inner"):
            time.sleep(0.02)
    assert list(watch.milliseconds) == ["outer", "inner"]
    assert watch.milliseconds["inner"] >= 40 > watch.milliseconds["outer"]


# Videos with few frames


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_frames_are_repeated(qa: VideoQA, frames: Any, tmp_path: Path, count: int) -> None:
    clip = write_video(tmp_path / "clip.mp4", frames=count)
    for source in (clip, frames[:count]):
        video = qa.video(source)
        assert video.frames == qa.bundle.manifest.frames.default
        assert len(set(video.timestamps.tolist())) == count
        assert qa.ask(video, QUESTION, tokens(2)).token_ids


def test_an_array_is_taken_whole(qa: VideoQA, frames: Any) -> None:
    assert qa.video(frames[:3]).timestamps.tolist() == [0, 1, 2]
    assert qa.video(frames, frames=3).timestamps.tolist() == [0, 2, 3]


def test_frame_counts_outside_the_bundles(qa: VideoQA, frames: Any) -> None:
    for count in (0, -1, 2, 513, 10**9):
        with pytest.raises(OptionError, match=f"^{count} frames asked for, the bundle takes 3 to 512"):
            qa.video(frames, frames=count)


# Streaming


def test_pieces_make_the_answer(qa: VideoQA, video: Video) -> None:
    stream = qa.stream(video, QUESTION, tokens(100))
    pieces = list(stream)
    assert "".join(pieces).strip() == stream.answer.text
    decoded = qa.prompts.tokenizer.decode(list(stream.answer.token_ids), skip_special_tokens=True)
    assert "".join(pieces) == decoded
    assert all(pieces) and len(pieces) > 10
    assert list(stream) == []
    assert stream.answer is stream.answer


def test_the_answer_reads_what_is_left(qa: VideoQA, video: Video) -> None:
    stream = qa.stream(video, QUESTION, tokens(30))
    next(stream)
    assert stream.answer.token_ids == qa.ask(video, QUESTION, tokens(30)).token_ids


def test_an_abandoned_stream_leaves_no_trace(qa: VideoQA, video: Video) -> None:
    expected = qa.ask(video, QUESTION, tokens(20))
    abandoned = qa.stream(video, "Something else entirely?", tokens(50))
    for _ in range(5):
        next(abandoned)
    assert qa.ask(video, QUESTION, tokens(20)).token_ids == expected.token_ids
    del abandoned
    assert qa.ask(video, QUESTION, tokens(20)).token_ids == expected.token_ids


def test_streams_take_turns(qa: VideoQA, video: Video) -> None:
    questions = (QUESTION, "Who is there, and why?")
    expected = [qa.ask(video, question, tokens(40)).token_ids for question in questions]
    streams = [qa.stream(video, question, tokens(40)) for question in questions]
    for _ in range(10):
        for stream in streams:
            next(stream)
    assert [stream.answer.token_ids for stream in streams] == expected
    assert expected[0] != expected[1]


def test_a_stream_that_broke_off_gives_no_answer(qa: VideoQA, video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = qa.stream(video, QUESTION, tokens(50))
    next(stream)

    def broken(*arguments: object) -> None:
        raise BackendError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runtime.backend_ort.OrtDecoder, "step", broken)
        with pytest.raises(BackendError, match="the device is gone"):
            list(stream)
    with pytest.raises(BackendError, match="broke off with an error before; ask again"):
        _ = stream.answer


# Ends


def test_an_answer_ends_where_the_context_does(linvt_bundle: Path, tmp_path: Path, frames: Any) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=replaced("context", 100))
    with VideoQA.open(bundle) as qa:
        answer = qa.ask(frames, QUESTION, tokens(10**9))
        assert answer.prompt_tokens + len(answer.token_ids) == 100
        assert answer.finish_reason == "length"
        with pytest.raises(QuestionError, match="the model's context holds 100 with the answer; shorten the question"):
            qa.ask(frames, "Why? " * 30)


def test_a_cache_that_grows_gives_the_same_tokens(
    qa: VideoQA, video: Video, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = str(recorded("linvt-internvl2-a")["question"])
    rooms = []
    grow = runtime.backend_ort.OrtDecoder.grow
    monkeypatch.setattr(
        runtime.backend_ort.OrtDecoder, "grow", lambda self, room: (grow(self, room), rooms.append(self.room))
    )
    monkeypatch.setattr(runtime.kv_cache, "ANSWER_ROOM", 10**4)
    at_once = qa.ask(video, question, tokens(700)).token_ids
    assert rooms == [794]  # 94 + 700: rounded up, but never past what can be needed
    monkeypatch.setattr(runtime.kv_cache, "ANSWER_ROOM", 1)
    monkeypatch.setattr(runtime.kv_cache, "CACHE_BLOCK", 1)
    rooms.clear()
    assert qa.ask(video, question, tokens(700)).token_ids == at_once
    assert rooms == [95, 190, 380, 760, 794]


def test_memory_is_taken_as_the_answer_grows(qa: VideoQA, video: Video) -> None:
    decoder = qa.backend.decoder(qa.bundle.manifest.context)
    decoder.step(np.zeros((60, 48), np.float32), np.arange(60)[None])
    assert decoder.room == 192  # type: ignore[attr-defined]
    stream = qa.stream(video, QUESTION, tokens(10**9))
    assert next(stream)


# Options


def test_drawing_is_repeatable_with_a_seed(qa: VideoQA, video: Video) -> None:
    options = GenerationOptions(max_new_tokens=30, do_sample=True, temperature=2.0, seed=7, ignore_eos=True)
    first = qa.ask(video, QUESTION, options).token_ids
    assert qa.ask(video, QUESTION, options).token_ids == first
    assert qa.ask(video, QUESTION, replace(options, seed=8)).token_ids != first
    assert qa.ask(video, QUESTION, tokens(30)).token_ids != first


def test_options_reach_the_sampler(qa: VideoQA, video: Video) -> None:
    greedy = qa.ask(video, QUESTION, tokens(60))
    one = GenerationOptions(max_new_tokens=60, do_sample=True, top_k=1, ignore_eos=True)
    assert qa.ask(video, QUESTION, one).token_ids == greedy.token_ids
    assert qa.ask(video, QUESTION, replace(one, top_k=0, top_p=1e-9)).token_ids == greedy.token_ids
    assert qa.ask(video, QUESTION, replace(one, top_k=0, temperature=1e-6)).token_ids == greedy.token_ids
    penalised = qa.ask(video, QUESTION, replace(tokens(60), repetition_penalty=1e6))
    assert len(set(penalised.token_ids)) == 60 > len(set(greedy.token_ids))


def test_the_bundles_defaults_hold(linvt_bundle: Path, tmp_path: Path, frames: Any) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=replaced("generation/max_new_tokens", 3))
    with VideoQA.open(bundle) as qa:
        assert len(qa.ask(frames, QUESTION).token_ids) == 3


@pytest.mark.parametrize("threads", [0, -3, 1025, 10**12])
def test_thread_counts_that_make_no_sense(linvt_bundle: Path, threads: int) -> None:
    with pytest.raises(OptionError, match=f"^threads is {threads}, expected 1 to 1024"):
        VideoQA.open(linvt_bundle, threads=threads)


def test_one_thread_answers_alike(linvt_bundle: Path, qa: VideoQA, video: Video, frames: Any) -> None:
    with VideoQA.open(linvt_bundle, threads=1) as single:
        assert single.ask(frames, QUESTION, tokens(8)).token_ids == qa.ask(video, QUESTION, tokens(8)).token_ids


# Backends


def test_a_backend_that_is_not_there(linvt_bundle: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'tpu'; choose one of auto, cpu, cuda"):
        VideoQA.open(linvt_bundle, backend="tpu")  # type: ignore[arg-type]


def test_auto_takes_the_cpu_where_cuda_does_not_start(linvt_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built_for = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: built_for)
    if not runtime.ort_provider.cuda_failure():
        pytest.skip("CUDA starts here")
    assert VideoQA.open(linvt_bundle).backend.name == "cpu"


# Mistakes


@pytest.mark.parametrize("question", ["", " \n", "<|im_end|>", "x\udcff", None])
def test_a_question_is_refused_before_its_video_is_looked_at(qa: VideoQA, question: Any) -> None:
    with pytest.raises(QuestionError):
        qa.ask("/nowhere.mp4", question)


def test_a_video_of_another_bundle(qa: VideoQA, video: Video) -> None:
    with pytest.raises(OptionError, match="made with another bundle; make it again with this one's video"):
        qa.ask(replace(video, bundle="0" * 64), QUESTION)


def test_nothing_works_after_close(linvt_bundle: Path, frames: Any) -> None:
    qa = VideoQA.open(linvt_bundle)
    video = qa.video(frames)
    running = qa.stream(video, QUESTION, tokens(50))
    next(running)
    qa.close()
    qa.close()
    uses: list[Callable[[], object]] = [
        lambda: qa.video(frames),
        lambda: qa.ask(video, QUESTION),
        lambda: qa.stream(video, QUESTION),
        lambda: list(running),
    ]
    for use in uses:
        with pytest.raises(LinvtError, match=r"^this VideoQA is closed; open the bundle again$"):
            use()
    with pytest.raises(BackendError, match="closed"):
        qa.backend.graph("vision")


def test_an_answer_says_what_it_is_about(qa: VideoQA, video: Video) -> None:
    answer = qa.ask(video, QUESTION, tokens(5))
    assert isinstance(answer, Answer)
    assert answer.frame_timestamps == (0, 1, 2, 3, 4, 5)
    assert len(answer.token_ids) == 5
