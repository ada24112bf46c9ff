"""The questions of a calibration run: which are asked about which clip, and which have a known answer.

A .txt file holds one question per line. A .jsonl file holds one object per line: ``question`` and, where wanted, a
``clip`` by its name (see ``calibration.clips``) and its ``answer``: a string, or a list of those that are accepted.

Does not look at clips and asks nothing. Control tokens of a model in a question are ``runtime.text``'s to refuse.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from calibration.clips import numbered_lines, shown
from runtime.errors import CalibrationError
from runtime.manifest import JSON_ERRORS

__all__ = ["DEFAULT_QUESTIONS", "Labelled", "Questions", "questions_from", "same_answer"]

DEFAULT_QUESTIONS = (
    "What happens in this video?",
    "How many people can you see?",
    "What colour is the largest object, and where is it?",
    "Does the camera move?",
    "What happens first, and what happens after that?",
    "Describe the scene, the objects in it and how they move, from beginning to end, in as much detail as you can.",
    "Is there any text on the screen? If so, what does it say?",
    "Where was this filmed: indoors or outdoors?",
)
QUESTION_LIMIT = 10_000  # characters
CLOSING = string.whitespace + "\u00a0\u3000.!?,;:…。！？"  # what may follow an answer's last word


@dataclass(frozen=True)
class Labelled:
    """A question about one clip, and the answers that count as right."""

    clip: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        plain: questions about any clip, at least one.
        labelled: questions about one clip, with answers.
        named: (clip, question) without an answer.
    """

    plain: tuple[str, ...]
    labelled: tuple[Labelled, ...] = ()
    named: tuple[tuple[str, str], ...] = ()

    def for_clip(self, name: str, number: int, count: int) -> tuple[str, ...]:
        """The questions asked about a clip: all that name it, else ``count`` of the plain ones.

        The clip of the next ``number`` (from 0) goes on where this one stopped, and from the last to the first.
        """
        assert number >= 0 and count >= 1, (number, count)
        if own := tuple(question for clip, question in self._about() if clip == name):
            return own
        first = number * count
        return tuple(self.plain[i % len(self.plain)] for i in range(first, first + min(count, len(self.plain))))

    def about(self, names: Mapping[str, str]) -> Questions:
        """The same with other names of clips: ``names`` has the new one by the old one."""
        labelled = (Labelled(names.get(one.clip, one.clip), one.question, one.answers) for one in self.labelled)
        named = ((names.get(clip, clip), question) for clip, question in self.named)
        return Questions(self.plain, tuple(labelled), tuple(named))

    def unknown_clips(self, names: Iterable[str]) -> tuple[str, ...]:
        """Clips that questions are about and that are not among ``names``, each once, in the file's order."""
        known = set(names)
        return tuple(dict.fromkeys(clip for clip, _ in self._about() if clip not in known))

    def _about(self) -> list[tuple[str, str]]:
        return [*((labelled.clip, labelled.question) for labelled in self.labelled), *self.named]


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a .jsonl file; null is the same as leaving a field out."""

    question: str
    clip: str | None = None
    answer: str | list[str] | None = None

    def answers(self) -> tuple[str, ...]:
        """The accepted answers; none where there is no label."""
        return (self.answer,) if isinstance(self.answer, str) else tuple(self.answer or ())

    def fault(self) -> str:
        """What is wrong with it, or nothing."""
        if fault := _fault(self.question):
            return fault
        if self.clip is not None and not self.clip.strip():
            return "the clip is empty; name one or leave it out"
        if self.answer is None:
            return ""
        if self.clip is None:
            return "there is an answer and no clip; add the clip that the question is about"
        good = self.answers() and all(map(_bare, self.answers()))
        return "" if good else "an answer is empty; write one or leave it out"


def questions_from(path: str | Path | None) -> Questions:
    """A file's questions; None gives ``DEFAULT_QUESTIONS``, which also stand in for plain ones that a file lacks.

    Raises:
        CalibrationError: the file is missing, empty, not UTF-8, of another kind, or a line of it does not fit.
    """
    if path is None:
        return Questions(DEFAULT_QUESTIONS)
    given = Path(path)
    reader = {".txt": _questions_from_text, ".jsonl": _questions_from_json}.get(given.suffix.lower())
    if reader is None:
        raise CalibrationError(f"{shown(given)}: expected questions in a .txt (one per line) or .jsonl file; rename it")
    lines = numbered_lines(given, "a file of questions, one per line")
    if not lines:
        raise CalibrationError(f"{shown(given)}: is empty; write one question per line")
    return reader(shown(given), lines)


def same_answer(told: str, answers: Collection[str]) -> bool:
    """Whether ``told`` is one of ``answers``; case, surrounding whitespace and final punctuation do not matter."""
    assert not isinstance(answers, str), answers
    return _bare(told) in map(_bare, answers)


def _questions_from_text(name: str, lines: list[tuple[int, str]]) -> Questions:
    for number, line in lines:
        if fault := _fault(line):
            raise CalibrationError(f"{name}, line {number}: {fault}")
    return Questions(tuple(line for _, line in lines))


def _questions_from_json(name: str, lines: list[tuple[int, str]]) -> Questions:
    plain, labelled, named = list[str](), list[Labelled](), list[tuple[str, str]]()
    for number, text in lines:
        line = _line_from_json(text, f"{name}, line {number}")
        question = line.question.strip()
        clip = None if line.clip is None else str(PurePosixPath(line.clip))
        if clip is None:
            plain.append(question)
        elif answers := line.answers():
            labelled.append(Labelled(clip, question, answers))
        else:
            named.append((clip, question))
    return Questions(tuple(plain) or DEFAULT_QUESTIONS, tuple(labelled), tuple(named))


def _line_from_json(text: str, place: str) -> _Line:
    try:
        line = msgspec.json.decode(text, type=_Line)
    except JSON_ERRORS as error:
        raise CalibrationError(
            f'{place}: {error!s:.200}; expected {{"question": ..., "clip": ..., "answer": ...}}, the last two optional'
        ) from error
    if fault := line.fault():
        raise CalibrationError(f"{place}: {fault}")
    return line


def _fault(question: str) -> str:
    """What is wrong with a question, or nothing."""
    if not question.strip():
        return "the question is empty; write one or remove the line"
    if (length := len(question.strip())) > QUESTION_LIMIT:
        return f"the question has {length} characters; expected at most {QUESTION_LIMIT}, shorten it"
    return ""


def _bare(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().rstrip(CLOSING).casefold()
