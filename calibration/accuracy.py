"""How many labelled questions a bundle answers rightly, through the runtime as a user asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from calibration.questions import Labelled, same_answer
from runtime.engine import VideoQA
from runtime.errors import VideoError

__all__ = ["right_answers"]


def right_answers(
    qa: VideoQA,
    clips: Mapping[str, Path],
    questions: Sequence[Labelled],
    frames: int | None,
    progress: Callable[[str], None],
) -> list[bool]:
    """Whether each question is answered rightly; one about a clip that cannot be read is not.

    Args:
        qa: an opened bundle.
        clips: paths by the names that questions use.
        questions: those of one clip should follow each other, so that it is read once.
        frames: taken of every clip; None for the bundle's default.
        progress: told which question is on.
    """
    right = []
    seen, name = None, None
    for number, question in enumerate(questions, 1):
        if number % 50 == 1:
            progress(f"question {number}/{len(questions)}")
        if question.clip != name:
            name = question.clip
            try:
                seen = qa.video(clips[name], frames=frames)
            except VideoError:
                seen = None
        told = qa.ask(seen, question.question).text if seen is not None else None
        right.append(told is not None and same_answer(told, question.answers))
    return right
