"""``VideoQA``: the recorded tokens come out, a kept video costs nothing again, and mistakes are refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runtime.engine
import runtime.ort_provider
from runtime import Answer, BackendError, GenerationOptions, LinvtError, OptionError, QuestionError, Video, VideoQA
from runtime.answer import Stopwatch
from runtime.backend import Backend, Decoder, Graph, Tensor, open_backend
from tests import video_qa
from tests.bundles import forge, replaced
from tests.video_qa import QUESTION, Recorded, tokens
from tests.videos import write_video

frames, qa, video = video_qa.frames, video_qa.qa, video_qa.video


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


def test_a_stage_inside_another_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 0.001, 0.021, 0.022, 0.052, 0.055])  # of a clock: each block looks as it begins and ends
    monkeypatch.setattr("runtime.answer.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    watch = Stopwatch()
    with watch("outer"):
        with watch("inner"):
            pass
        with watch("inner"):
            pass
    assert list(watch.milliseconds) == ["outer", "inner"]
    assert watch.milliseconds == pytest.approx({"outer": 5.0, "inner": 50.0})


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
