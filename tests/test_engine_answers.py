"""Answers of ``VideoQA`` come in pieces, end where the context does, and follow their options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime.backend_ort
import runtime.kv_cache
from runtime import BackendError, GenerationOptions, OptionError, QuestionError, Video, VideoQA
from tests import video_qa
from tests.bundles import forge, replaced
from tests.video_qa import QUESTION, Recorded, tokens

frames, qa, video = video_qa.frames, video_qa.qa, video_qa.video


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
