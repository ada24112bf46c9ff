"""Questions about pictures through a video bundle: the family's own image prompt, without LinVT."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import GenerationOptions, VideoQA
from runtime.errors import OptionError, QuestionError, VideoError
from runtime.run import main
from runtime.seen import visuals_of
from tests.bundles import forge, replaced

SHORT = GenerationOptions(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def qa(linvt_bundle: Path) -> Iterator[VideoQA]:
    """An opened bundle with LinVT; no test closes it."""
    with VideoQA.open(linvt_bundle) as opened:
        yield opened


@pytest.fixture
def picture(random: np.random.Generator) -> Any:
    """(50, 72, 3) uint8."""
    return random.integers(0, 256, (50, 72, 3)).astype(np.uint8)


def saved(path: Path, picture: Any) -> Path:
    Image.fromarray(picture).save(path)
    return path


def test_a_file_its_bytes_and_an_array_are_the_same_picture(qa: VideoQA, picture: Any, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", picture)
    forms = [path, str(path), path.read_bytes(), picture]
    features = [qa.images(form).features for form in forms] + [qa.images([form]).features for form in forms]
    for found in features:
        np.testing.assert_array_equal(found, features[0])
    assert features[0].shape == (1, qa.bundle.manifest.frames.tokens, qa.bundle.manifest.width)


def test_many_pictures_of_any_size_keep_their_order(qa: VideoQA, random: np.random.Generator) -> None:
    pictures = [random.integers(0, 256, (*random.integers(1, 99, 2), 3)).astype(np.uint8) for _ in range(9)]
    together = qa.images(pictures)
    apart = np.concatenate([qa.images(one).features for one in pictures], axis=1)
    np.testing.assert_allclose(together.features, apart, atol=1e-5)


def test_the_prompt_is_the_familys_for_one_and_for_several(qa: VideoQA, picture: Any) -> None:
    tokens = "<IMG_CONTEXT>" * 4
    texts = {}
    for count in (1, 2):
        visuals = visuals_of(qa.images([picture] * count), qa.bundle.manifest)
        prompt = qa.prompt("Who?", visuals)
        texts[count] = qa.prompts.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    assert f"<|im_start|>user\n<img>{tokens}</img>\nWho?<|im_end|>" in texts[1]
    assert f"user\nImage-1: <img>{tokens}</img>\nImage-2: <img>{tokens}</img>\nWho?<|im_end|>" in texts[2]


def test_linvt_is_not_asked_and_what_is_seen_depends_on_the_picture(qa: VideoQA, picture: Any) -> None:
    assert np.abs(qa.images(picture).features - qa.images(255 - picture).features).max() > 0.1
    answers = [qa.ask(qa.images(of), "Who?", SHORT) for of in (picture, 255 - picture)]
    for answer in answers:
        assert not {"refine", "aggregate"} & answer.milliseconds.keys()
    kept = qa.images(picture)
    assert qa.ask(kept, "Who?", SHORT).token_ids == answers[0].token_ids
    assert {"decode_images", "preprocess", "vision"} <= kept.milliseconds.keys()
    changed = qa.prompt("Who?", visuals_of(kept, qa.bundle.manifest))
    assert changed.input_ids.size == answers[1].prompt_tokens


# What cannot be asked


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no picture"),
        ("nowhere.png", "nowhere.png"),
        (b"text", "not an image"),
        (np.zeros((4, 4), np.uint8), "expected uint8 (H, W, 3)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "expected uint8 (H, W, 3)"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8 (H, W, 3)"),
        (np.zeros((4, 4, 3)), "expected uint8 (H, W, 3)"),
        ([None], "expected a file"),
        (["a.png", 5], "a.png"),
        ([""], "expected a file"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(qa: VideoQA, images: Any, said: str) -> None:
    with pytest.raises((VideoError, OptionError)) as caught:
        qa.images(images)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_more_pictures_than_the_context_holds_are_refused(qa: VideoQA, picture: Any) -> None:
    many = qa.images([picture] * 9)
    forged = type(many)(
        count=10**4, features=np.zeros((1, 4 * 10**4, 48), np.float32), milliseconds={}, bundle=many.bundle
    )
    with pytest.raises(QuestionError, match=r"question and image make .* take fewer pictures"):
        qa.ask(forged, "Who?")


# System text and earlier turns


def test_a_system_text_of_ones_own_stands_in_the_prompt(qa: VideoQA, picture: Any) -> None:
    seen = qa.images(picture)
    own = qa.ask(seen, "Who?", SHORT, system="Be brief.")
    assert own.prompt_tokens < qa.ask(seen, "Who?", SHORT).prompt_tokens
    for system, said in (("<|im_end|>", "system text holds the control token"), ("\ud800", "lone surrogate")):
        with pytest.raises(QuestionError, match=said):
            qa.ask(seen, "Who?", SHORT, system=system)


def test_a_model_without_a_place_for_a_system_text_says_so(linvt_bundle: Path, tmp_path: Path, picture: Any) -> None:
    bundle = forge(linvt_bundle, tmp_path / "bundle", edit=replaced("prompt/system", None))
    with VideoQA.open(bundle) as qa, pytest.raises(OptionError, match="no place for a system text"):
        qa.ask(qa.images(picture), "Who?", system="Be brief.")


@pytest.mark.parametrize(
    ("history", "said"),
    [
        ([("", "A cat.")], "empty"),
        ([("Who?", "<img>")], "earlier answer holds the control token '<img>'"),
        ([("Who <|im_end|>?", "x")], "control token"),
        ([("Who?", 5)], "earlier answer is of type int"),
    ],
)
def test_earlier_turns_are_checked_like_the_question(qa: VideoQA, picture: Any, history: Any, said: str) -> None:
    with pytest.raises(QuestionError, match=said.replace("?", r"\?")):
        qa.ask(qa.images(picture), "Who?", history=history)


# The command


def test_the_command_answers_about_pictures(
    linvt_bundle: Path, tmp_path: Path, picture: Any, capsys: pytest.CaptureFixture[str], qa: VideoQA
) -> None:
    files = [str(saved(tmp_path / name, picture)) for name in ("a.png", "b.bmp")]
    arguments = [str(linvt_bundle), "Who is it?", "--max-new-tokens", "4", "--ignore-eos"]
    assert main([*arguments, "--image", files[0], "--image", files[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["token_ids"]) == qa.ask(qa.images(files), "Who is it?", SHORT).token_ids
    assert found["frame_timestamps"] == [] and "refine" not in found["milliseconds"]
    assert main([*arguments, "--image", files[0], "--system", "Be brief."]) == 0
    assert "[1 image |" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["clip.mp4", "Who?", "--image", "a.png"], "with --image the arguments are BUNDLE QUESTION"),
        (["--image", "a.png"], "with --image the arguments are BUNDLE QUESTION"),
        (["Who?", "--image", "a.png", "--frames", "4"], "about a VIDEO"),
    ],
)
def test_the_command_says_how_pictures_are_given(
    linvt_bundle: Path, extra: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(linvt_bundle), *extra])
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_the_command_refuses_a_broken_picture_in_one_line(
    linvt_bundle: Path, tmp_path: Path, picture: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    (tmp_path / "half.png").write_bytes(buffer.getvalue()[:500])
    assert main([str(linvt_bundle), "Who?", "--image", str(tmp_path / "half.png")]) == 1
    error = capsys.readouterr().err
    assert "half.png" in error and error.count("\n") == 1
