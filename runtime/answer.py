"""What a question gives back: a stream of text pieces, and the answer with its timings once it is whole.

Generates nothing: ``engine`` hands in the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from runtime.errors import BackendError

__all__ = ["Answer", "FinishReason", "Progress", "Stopwatch", "Stream"]

FinishReason = Literal["stop", "length"]


class Stopwatch:
    """Milliseconds per stage. A stage timed inside another counts for itself alone."""

    def __init__(self, milliseconds: dict[str, float] | None = None) -> None:
        self.milliseconds = milliseconds or {}  # in the order in which stages began
        self.inner: list[float] = []  # time of the stages inside each open one

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time the block takes to ``stage``."""
        self.milliseconds.setdefault(stage, 0.0)
        self.inner.append(0.0)
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = 1000 * (time.perf_counter() - begin)
            own = took - self.inner.pop()
            self.milliseconds[stage] += own
            if self.inner:
                self.inner[-1] += took


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without special tokens, stripped of white space at both ends.
        token_ids: generated ids, without the one that ended the answer.
        finish_reason: "stop" at a stop token, "length" when max_new_tokens or the context ran out.
        prompt_tokens: length of the prompt, visual rows included.
        frame_timestamps: seconds of the frames the answer is about.
        milliseconds: per stage; stages that a kept ``Video`` made unnecessary are absent.
        first_token_ms: from the question, and the video where it was not kept, to the first token.
        tokens_per_second: of the tokens after the first; 0 when there was one.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    frame_timestamps: tuple[float, ...]
    milliseconds: dict[str, float]
    first_token_ms: float
    tokens_per_second: float


@dataclass
class Progress:
    """What a running generation fills in; the finish reason comes last."""

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    first_token_ms: float = 0.0


class Stream:
    """Text pieces of one answer as they come; none cuts a character."""

    def __init__(self, pieces: Iterator[str], progress: Progress, finish: Callable[[str, Progress], Answer]) -> None:
        self._pieces = pieces
        self._progress = progress
        self._finish = finish
        self._text: list[str] = []
        self._answer: Answer | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces, None)
        if piece is None:
            if self._progress.finish_reason is None:
                raise BackendError("this answer broke off with an error before; ask again")
            self._answer = self._answer or self._finish("".join(self._text), self._progress)
            raise StopIteration
        self._text.append(piece)
        return piece

    @property
    def answer(self) -> Answer:
        """The whole answer; what was not yet read of the stream is generated first."""
        for _ in self:
            pass
        assert self._answer is not None
        return self._answer
