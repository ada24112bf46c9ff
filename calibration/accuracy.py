"""How many labelled questions a bundle answers rightly, through the runtime.

Answers are the likeliest tokens: two bundles are compared, and drawing would make chance part of the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from calibration.questions import Labelled, same_answer
from runtime.engine import VideoQA
from runtime.errors import CalibrationError, QuestionError
from runtime.options import GenerationOptions

__all__ = ["answerable", "right_answers"]

GREEDY = GenerationOptions(do_sample=False)


def answerable(labelled: Sequence[Labelled], skipped: Mapping[str, str], *, required: bool) -> list[Labelled]:
    """Labelled questions about clips that could be read, those of one clip one after the other.

    Args:
        labelled: all of them.
        skipped: clips that could not be read, with the reason.
        required: whether there has to be one.

    Raises:
        CalibrationError: there is none.
    """
    left = [question for question in labelled if question.clip not in skipped]
    if required and not left:
        raise CalibrationError(
            f"--max-drop needs labelled questions about clips that can be read, and all {len(labelled)} are about "
            f"{', '.join(skipped):.80}; give readable videos"
        )
    return sorted(left, key=lambda question: question.clip)


def right_answers(
    qa: VideoQA,
    clips: Mapping[str, Path],
    questions: Sequence[Labelled],
    frames: int | None,
    progress: Callable[[str], None],
) -> list[bool]:
    """Whether each question is answered rightly.

    Args:
        qa: an opened bundle.
        clips: paths by the names that questions use.
        questions: those of one clip should follow each other, so that it is read once.
        frames: taken of every clip; None for the bundle's default.
        progress: told which question is on.

    Raises:
        CalibrationError: a question does not fit the model.
        VideoError: a clip cannot be read.
    """
    right: list[bool] = []
    name = None
    for number, question in enumerate(questions, 1):
        if number % 50 == 1:
            progress(f"question {number}/{len(questions)}")
        if question.clip != name:
            name = question.clip
            seen = qa.video(clips[name], frames=frames)
        try:
            told = qa.ask(seen, question.question, GREEDY).text
        except QuestionError as error:
            raise CalibrationError(f"question {question.question!r:.60} about {name}: {error}") from error
        right.append(same_answer(told, question.answers))
    return right
