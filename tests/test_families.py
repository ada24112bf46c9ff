"""Every family through its exported bundle: the original code's numbers, tokens and prompts, by the public API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.parity import Tolerance
from export.cases import CHAIN, Comparer
from export.reference import Reference
from runtime.answer import Stopwatch
from runtime.embedding import prompt_rows
from runtime.engine import VideoQA
from runtime.options import GenerationOptions
from runtime.positions import next_positions
from runtime.seen import visuals_of
from runtime.text import Prompt, Visuals
from tests.conftest import GOLDEN, Recorded
from tests.families import FIXTURES, ROUTED, Fixture, random_linvt

Load = Callable[[str], Recorded]
GREEDY = GenerationOptions(max_new_tokens=16, ignore_eos=True, do_sample=False, repetition_penalty=1.0)


@pytest.fixture(params=FIXTURES, ids=str, scope="module")
def fixture(request: pytest.FixtureRequest) -> Fixture:
    """One route of one fixture."""
    found: Fixture = request.param
    return found


@pytest.fixture
def bundle(fixture: Fixture, export_bundle: Callable[..., Path]) -> Path:
    """Its bundle without LinVT."""
    return export_bundle(fixture.name, linvt="none", **fixture.options)


@pytest.fixture(scope="session")
def linvt_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Random LinVT weights for an LLM of a width."""
    folder = tmp_path_factory.mktemp("linvt")
    return lambda width: str(random_linvt(folder / f"{width}.safetensors", width))


def largest(found: np.ndarray, expected: np.ndarray, name: str) -> float:  # type: ignore[type-arg]
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    difference = float(np.abs(found - expected).max())
    print(f"{name}: largest difference {difference:.2e}")
    return difference


def limit(expected: np.ndarray) -> float:  # type: ignore[type-arg]
    return 1e-3 if np.abs(expected).max() > 10 else 1e-4


def every_logit(qa: VideoQA, rows: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Logits (S, V) at every position: the first half at once, then row by row."""
    decoder = qa.backend.decoder(len(rows))
    half = len(rows) // 2
    spans = [slice(0, half), *(slice(at, at + 1) for at in range(half, len(rows)))]
    return np.stack([decoder.step(rows[span], position_ids[:, span]) for span in spans])


def assert_the_recorded_logits(
    qa: VideoQA,
    prompt: Prompt,
    visual: np.ndarray,  # type: ignore[type-arg]
    expected: np.ndarray,  # type: ignore[type-arg]
) -> None:
    rows = prompt_rows(qa.table.rows, prompt, qa.bundle.manifest.prompt, visual)
    found = every_logit(qa, rows, prompt.position_ids)
    assert largest(found, expected[len(rows) // 2 - 1 :], "logits") < limit(expected)


def test_frames_become_the_recorded_tokens(fixture: Fixture, bundle: Path, recorded: Load) -> None:
    arrays = recorded(fixture.name)
    with VideoQA.open(bundle) as qa:
        video = qa.video(arrays["frames_u8"])
        expected = fixture.of(arrays, "visual_tokens") if fixture.prefix == "video." else arrays["visual_tokens"]
        assert largest(video.features[0], expected.reshape(-1, expected.shape[-1]), "tokens") < 1e-4


def test_the_prompt_gives_the_recorded_logits_and_answer(fixture: Fixture, bundle: Path, recorded: Load) -> None:
    arrays = recorded(fixture.name)
    question = fixture.asked(arrays)
    with VideoQA.open(bundle) as qa:
        video = qa.video(arrays["frames_u8"])
        prompt = qa.prompt(question, visuals_of(video, qa.bundle.manifest))
        assert_the_recorded_logits(qa, prompt, video.features[0], fixture.of(arrays, "logits"))
        answer = qa.ask(video, question, GREEDY)
        assert list(answer.token_ids) == fixture.of(arrays, "greedy_ids").tolist()


def test_pictures_are_seen_as_single_frames_are(fixture: Fixture, bundle: Path, recorded: Load) -> None:
    """The same tokens as of a video's frames where the family encodes frames as pictures; each in its own place."""
    frames = recorded(fixture.name)["frames_u8"]
    with VideoQA.open(bundle) as qa:
        images = qa.images(list(frames))
        if fixture.options.get("route") != "video":
            assert largest(images.features, qa.video(frames).features, "pictures") < 1e-6
        assert images.count == len(frames)
        first = qa.ask(qa.images(frames[0]), "What is in this picture?", GREEDY)
        both = qa.ask(qa.images(list(frames[:2])), "What is in this picture?", GREEDY)
    tokens = qa.bundle.manifest.frames.tokens
    assert first.prompt_tokens + tokens <= both.prompt_tokens <= first.prompt_tokens + 2 * tokens + 40
    assert len(first.token_ids) == 16 and first.frame_timestamps == ()


def test_a_conversation_goes_on(fixture: Fixture, bundle: Path, recorded: Load) -> None:
    """Earlier turns stand before the question, the video in the first of them, and change the answer's numbers."""
    arrays = recorded(fixture.name)
    with VideoQA.open(bundle) as qa:
        video = qa.video(arrays["frames_u8"])
        visuals = visuals_of(video, qa.bundle.manifest)
        alone = qa.prompt("And then?", visuals)
        later = qa.prompt("And then?", visuals, history=[("Who is it?", "A cat."), ("Where?", "At home.")])
        decode = qa.prompts.tokenizer.decode
        text = decode(later.input_ids[later.visual_positions[-1] + 1 :].tolist(), skip_special_tokens=False)
        places = [text.index(part) for part in ("Who is it?", "A cat.", "Where?", "At home.", "And then?")]
        assert places == sorted(places)
        np.testing.assert_array_equal(alone.visual_positions, later.visual_positions)
        asked = [qa.ask(video, "And then?", GREEDY, history=history) for history in ((), [("Who?", "A cat.")])]
        assert asked[0].token_ids != asked[1].token_ids


@pytest.mark.parametrize("fixture", ROUTED, ids=str)
def test_linvt_rows_stand_where_the_recording_has_them(
    fixture: Fixture, export_bundle: Callable[..., Path], recorded: Load, linvt_of: Callable[[int], str]
) -> None:
    arrays = recorded(fixture.name)
    vectors, expected = arrays["linvt.vectors"][0], arrays["linvt.logits"][0]
    bundle = export_bundle(fixture.name, linvt=linvt_of(vectors.shape[1]), **fixture.options)
    with VideoQA.open(bundle) as qa:
        system = "" if "system" not in arrays["linvt.prompt_text"].tobytes().decode() else None
        visuals = Visuals("video", 3, len(vectors), len(vectors), on_grid=False)
        prompt = qa.prompt(fixture.asked(arrays), visuals, system=system)
        first = int(arrays["linvt.span_start"])
        assert prompt.visual_positions.tolist() == list(range(first, first + len(vectors)))
        assert_the_recorded_logits(qa, prompt, vectors, expected)
        rows = prompt_rows(qa.table.rows, prompt, qa.bundle.manifest.prompt, vectors)
        decoder, position = qa.backend.decoder(len(rows) + 16), next_positions(prompt.position_ids)
        ids = [int(decoder.step(rows, prompt.position_ids).argmax())]
        while len(ids) < 16:
            ids.append(int(decoder.step(qa.table.rows(np.array(ids[-1:])), position).argmax()))
            position += 1
        assert ids == arrays["linvt.greedy_ids"].tolist()


@pytest.mark.parametrize("fixture", [f for f in FIXTURES if f.options.get("route") != "video"], ids=str)
def test_any_family_takes_linvt_weights_and_agrees_with_pytorch(
    fixture: Fixture,
    export_bundle: Callable[..., Path],
    recorded: Load,
    linvt_of: Callable[[int], str],
    random: np.random.Generator,
) -> None:
    width = recorded(fixture.name)["visual_tokens"].shape[-1]
    weights = linvt_of(width)
    bundle = export_bundle(fixture.name, linvt=weights, **fixture.options)
    clip = random.integers(0, 256, (5, 48, 80, 3)).astype(np.uint8)
    with VideoQA.open(bundle) as qa:
        reference = Reference.open(str(GOLDEN / fixture.name), weights, qa.bundle.manifest)
        case = Comparer(qa, reference, Tolerance(1e-4, 1e-4), 8).case(clip, "Who is there?", None)
        for row in case.rows:  # in the chain, random LinVT weights enlarge the tower's rounding
            assert row.passed or (row.scope == CHAIN and row.max_abs < 10 * row.limit), row
        assert {row.stage for row in case.rows} == {"vision", "embedding", "refine", "aggregate", "decode"}
        images = qa.images(clip[0])
        assert images.features.shape == (1, qa.bundle.manifest.frames.tokens, width)
        watch = Stopwatch()
        prompt = qa.prompt("Who?", visuals_of(images, qa.bundle.manifest))
        np.testing.assert_array_equal(qa.visual_rows(prompt, images, watch), images.features[0])
        assert not watch.milliseconds  # LinVT was not asked
        assert qa.ask(images, "Who?", GREEDY).milliseconds.keys() == {"prompt", "load", "prefill", "decode"}
