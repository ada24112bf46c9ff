"""Questions of a calibration run: from a file or the ones at hand, shared out over clips, compared with answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from calibration.questions import DEFAULT_QUESTIONS, Labelled, Questions, questions_from, same_answer
from runtime.errors import CalibrationError


def written(folder: Path, text: str | bytes, name: str = "questions.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        questions_from(path)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500, text
    assert all(part in text for part in (path.name[-50:], *parts)), text


def test_without_a_file_there_are_questions_of_several_lengths() -> None:
    assert questions_from(None) == Questions(DEFAULT_QUESTIONS, ())
    assert 6 <= len(set(DEFAULT_QUESTIONS)) == len(DEFAULT_QUESTIONS) <= 10
    assert max(map(len, DEFAULT_QUESTIONS)) > 4 * min(map(len, DEFAULT_QUESTIONS))


def test_a_text_file_has_one_question_per_line(tmp_path: Path) -> None:
    text = "\ufeffWho is it?\r\n\r\n  What colour?  \r# not a comment?\nWas ist das für 猫?"
    found = questions_from(str(written(tmp_path, text, "q.TXT")))
    assert found == Questions(("Who is it?", "What colour?", "# not a comment?", "Was ist das für 猫?"))


def test_a_jsonl_file_has_plain_labelled_and_named_questions(tmp_path: Path) -> None:
    lines = [
        {"question": " Who? "},
        {"question": "How many?", "clip": "./a//b.mp4", "answer": ["3", "three"]},
        {
            "question": "Which\u2028colour?",
            "clip": "c.mp4",
            "answer": "red",
        },
        {"question": "Why?", "clip": "d", "answer": None},
        {"question": "And then?", "clip": None},
    ]
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    found = questions_from(written(tmp_path, text))
    assert found.plain == ("Who?", "And then?")
    assert found.labelled == (
        Labelled("a/b.mp4", "How many?", ("3", "three")),
        Labelled("c.mp4", "Which\u2028colour?", ("red",)),
    )
    assert found.named == (("d", "Why?"),)


def test_a_file_of_labelled_questions_alone_leaves_the_plain_ones_at_hand(tmp_path: Path) -> None:
    found = questions_from(written(tmp_path, '{"question": "Who?", "clip": "a.mp4", "answer": "me"}'))
    assert found.plain == DEFAULT_QUESTIONS and len(found.labelled) == 1


def test_clips_take_turns_with_the_plain_questions(random: np.random.Generator) -> None:
    for _ in range(50):
        size, count = int(random.integers(1, 12)), int(random.integers(1, 15))
        questions = Questions(tuple(f"question {i}" for i in range(size)))
        turns = [questions.for_clip(f"{number}.mp4", number, count) for number in range(size)]
        assert turns == [questions.for_clip(f"{number}.mp4", number, count) for number in range(size)]
        assert all(len(set(turn)) == len(turn) == min(count, size) for turn in turns)
        enough = -(-size // count)
        assert {question for turn in turns[:enough] for question in turn} == set(questions.plain)


def test_a_clip_that_is_named_gets_its_own_questions() -> None:
    labelled = (
        Labelled("a.mp4", "One?", ("1",)),
        Labelled("b.mp4", "Two?", ("2",)),
        Labelled("a.mp4", "Three?", ("3",)),
    )
    questions = Questions(("Plain?",), labelled, (("a.mp4", "Four?"), ("c", "Five?")))
    assert questions.for_clip("a.mp4", 0, 1) == ("One?", "Three?", "Four?")
    assert questions.for_clip("c", 1, 2) == ("Five?",)
    assert questions.for_clip("sub/a.mp4", 2, 2) == ("Plain?",)


def test_clips_that_no_one_has_are_listed_once() -> None:
    labelled = tuple(Labelled(clip, "Who?", ("me",)) for clip in ("z.mp4", "a.mp4", "z.mp4"))
    questions = Questions(("Plain?",), labelled, (("y", "Why?"), ("b", "Why?")))
    assert questions.unknown_clips(["a.mp4", "b"]) == ("z.mp4", "y")
    assert questions.unknown_clips(iter(["a.mp4", "b", "y", "z.mp4", "more"])) == ()


@pytest.mark.parametrize(
    ("told", "answers", "same"),
    [
        ("Red.", ["red"], True),
        ("  red ! \n", ["blue", "RED"], True),
        ("3", ["3."], True),
        ("STRASSE", ["Straße"], True),
        ("红。", ["红"], True),
        ("reddish", ["red"], False),
        ("the red", ["red"], False),
        ("3.5", ["35"], False),
        ("-3", ["3"], False),
        ("", ["red"], False),
        ("red", [], False),
    ],
)
def test_answers_are_the_same_whatever_their_case_and_final_mark(told: str, answers: list[str], same: bool) -> None:
    assert same_answer(told, answers) is same


GOOD = '{"question": "Who?"}\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (GOOD + "\n{", ["line 3", "truncated"]),
        (GOOD + "Who?", ["line 2", "malformed"]),
        (GOOD + GOOD.strip() + GOOD, ["line 2", "malformed"]),
        ('["Who?"]', ["line 1", "Expected `object`"]),
        ('{"clip": "a.mp4"}', ["line 1", "missing required field `question`"]),
        ('{"question": 3}', ["line 1", "Expected `str`, got `int`", "$.question"]),
        ('{"question": "Who?", "anser": "me"}', ["line 1", "unknown field `anser`"]),
        ('{"question": "Who?", "clip": "a", "answer": 3}', ["line 1", "$.answer"]),
        ('{"question": "Who?", "clip": "a", "answer": ["x", 3]}', ["line 1", "$.answer"]),
        ('{"question": "\\ud800"}', ["line 1"]),
        ('{"question": ' + "[" * 100_000, ["line 1"]),
        (GOOD + '{"question": " "}', ["line 2", "question is empty"]),
        ('{"question": "' + "x" * 10_001 + '"}', ["line 1", "10001 characters", "10000"]),
        ('{"question": "Who?", "clip": " ", "answer": "me"}', ["line 1", "clip is empty"]),
        ('{"question": "Who?", "answer": "me"}', ["line 1", "no clip"]),
        ('{"question": "Who?", "clip": "a", "answer": []}', ["line 1", "answer is empty"]),
        ('{"question": "Who?", "clip": "a", "answer": ["me", " . "]}', ["line 1", "answer is empty"]),
        ("", ["is empty"]),
        (" \n\n", ["is empty"]),
        (GOOD.encode() + b'{"question": "\xff"}', ["is not UTF-8"]),
        (GOOD.encode("utf-16"), ["is not UTF-8"]),
        (b"\0" * 9, ["binary data"]),
    ],
    ids=range(22),
)
def test_jsonl_files_that_are_refused(tmp_path: Path, text: str | bytes, parts: Sequence[str]) -> None:
    refused(written(tmp_path, text), *parts)


def test_text_files_that_are_refused(tmp_path: Path) -> None:
    refused(written(tmp_path, "Who?\n\n" + "x" * 10_001, "long.txt"), "line 3", "10001 characters")
    refused(written(tmp_path, "", "empty.txt"), "is empty")
    refused(written(tmp_path, b"Wer f\xfchrt?", "latin.txt"), "is not UTF-8")
    assert questions_from(written(tmp_path, "x" * 10_000, "fits.txt")).plain == ("x" * 10_000,)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    refused(written(tmp_path, "[]", "q.json"), ".txt", ".jsonl")
    refused(tmp_path / "absent.txt", "there is no such file")
    refused(tmp_path / ("x" * 5000 + ".txt"), "cannot be opened")
    (tmp_path / "folder.txt").mkdir()
    refused(tmp_path / "folder.txt", "not a regular file")
