"""A question to token ids: chat template, tokenizer, the places of the visual tokens and LinVT's text input.

The template sees ``messages`` and ``add_generation_prompt`` as in transformers, and besides ``system``,
``visual_token``, ``frames`` (how many) and ``tokens`` (visual tokens per video with LinVT, per frame without).

Does not look up embeddings, does not put visual rows in and does not know how long a context may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.errors import BundleError, QuestionError
from runtime.template import compiled, rendered

__all__ = ["Message", "Prompt", "PromptBuilder", "PromptSpec"]

# {"role": str, "content": str or list of {"type": "text", "text": str} and {"type": "video"}}
Message = Mapping[str, Any]
Ids = NDArray[np.int64]

_QUESTION_LIMIT = 1 << 17  # characters
_MARK = "\ue000\ue001"  # private use: no template holds it
_AGAIN = "export the bundle again"


class PromptSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a family wants to be asked; part of the manifest.

    Attributes:
        system: the system text the template is given.
        visual_token: the token whose rows are replaced by the video, as text and as id.
        visual_id: its id; it may lie outside the embedding table.
        stop_ids: ids that end an answer.
        reserved: control tokens that a question must not hold.
        text_input: what LinVT reads: the question's tokens, or the slice the released training code took.
        add_special_tokens: let the tokenizer add its own (a leading ``<s>``) to the prompt.
    """

    system: str = ""
    visual_token: str
    visual_id: int
    stop_ids: tuple[int, ...]
    reserved: tuple[str, ...] = ()
    text_input: Literal["question", "released_slice"] = "question"
    add_special_tokens: bool = False

    def __post_init__(self) -> None:
        if not self.visual_token or not all(self.reserved):
            raise ValueError("visual_token and every reserved token must have at least one character")
        if self.visual_id < 0 or not self.stop_ids or min(self.stop_ids) < 0:
            raise ValueError("visual_id and stop_ids must be 0 or more, and there must be a stop id")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question, tokenised.

    Attributes:
        input_ids: (S,) int64, the whole prompt.
        visual_positions: (rows,) int64, ascending: where in ``input_ids`` the video's rows go.
        text_ids: (L,) int64, what LinVT reads as text.
    """

    input_ids: Ids
    visual_positions: Ids
    text_ids: Ids


class PromptBuilder:
    """Renders and tokenises prompts of one bundle.

    Args:
        tokenizer_path: the bundle's ``tokenizer.json``.
        template_text: the bundle's ``chat_template.jinja``.
        spec: the manifest's prompt part.

    Raises:
        BundleError: one of them is damaged or they do not belong together.
    """

    def __init__(self, tokenizer_path: str | Path, template_text: str, spec: PromptSpec) -> None:
        self.spec = spec
        self.tokenizer = _open_tokenizer(tokenizer_path)
        self._template = compiled(template_text)
        found = self.tokenizer.token_to_id(spec.visual_token)
        if found != spec.visual_id:
            raise BundleError(
                f"tokenizer.json gives {spec.visual_token!r} the id {found}, the manifest {spec.visual_id}; "
                f"the files do not belong together, {_AGAIN}"
            )
        self._forbidden = dict.fromkeys((spec.visual_token, *spec.reserved))
        ids = ((self.tokenizer.token_to_id(token), token) for token in self._forbidden)
        self._forbidden_ids = {id_: token for id_, token in ids if id_ is not None}

    def check(self, question: str) -> None:
        """Refuse a question early, before its video is looked at.

        Raises:
            QuestionError: empty, far too long, not Unicode text, or holding a control token.
        """
        self._question_ids(question)

    def render(self, messages: Sequence[Message], *, frames: int, tokens: int) -> str:
        """The prompt as text, ending where the answer begins."""
        return rendered(
            self._template,
            messages=messages,
            add_generation_prompt=True,
            system=self.spec.system,
            visual_token=self.spec.visual_token,
            frames=frames,
            tokens=tokens,
        )

    def build(self, question: str, *, frames: int, tokens: int, rows: int) -> Prompt:
        """The prompt for one question about one video.

        Args:
            question: taken as it is, spaces included.
            frames: frames of the video.
            tokens: visual tokens per video with LinVT, per frame without.
            rows: visual rows that must find a place.

        Raises:
            QuestionError: as ``check``.
            BundleError: the template fails or leaves another number of places than ``rows``.
        """
        question_ids = self._question_ids(question)
        text = self.render(_asking(question), frames=frames, tokens=tokens)
        encoding = self.tokenizer.encode(text, add_special_tokens=self.spec.add_special_tokens)
        input_ids = np.array(encoding.ids, np.int64)
        positions = np.flatnonzero(input_ids == self.spec.visual_id)
        if positions.size != rows:
            raise BundleError(
                f"the prompt holds {self.spec.visual_token!r} {positions.size} times, expected one for each "
                f"of {rows} visual rows; template and stages do not belong together, {_AGAIN}"
            )
        if self.spec.text_input == "question":
            return Prompt(input_ids, positions, question_ids)
        at = self._question_start(text, question, frames=frames, tokens=tokens)
        head = next(i for i, (_, end) in enumerate(encoding.offsets) if end > at)
        return Prompt(input_ids, positions, input_ids[question_ids.size : question_ids.size + head])

    def _question_start(self, text: str, question: str, *, frames: int, tokens: int) -> int:
        """Where in ``text`` the question begins; a search alone would find a short one in other words too."""
        marked = self.render(_asking(_MARK), frames=frames, tokens=tokens)
        at = marked.find(_MARK)
        if at < 0 or not text.startswith(question, at):
            raise BundleError(f"the prompt template changes the question, expected it unchanged; {_AGAIN}")
        return at

    def _question_ids(self, question: str) -> Ids:
        """The question's own ids (L,), after everything that can be wrong with it was looked for."""
        _check_question(question)
        ids = self.tokenizer.encode(question, add_special_tokens=False).ids
        spelled = [token for token in self._forbidden if token in question]
        normalised = [self._forbidden_ids[id_] for id_ in ids if id_ in self._forbidden_ids]
        for token in spelled + normalised:
            raise QuestionError(f"the question holds the control token {token!r}; write it without")
        if not ids:
            raise QuestionError("the question has no text the tokenizer knows; ask in words")
        return np.array(ids, np.int64)


def _check_question(question: str) -> None:
    if not isinstance(question, str):
        raise QuestionError(f"the question is of type {type(question).__name__}, expected str; pass text")
    if not question.strip():
        raise QuestionError("the question is empty; ask something about the video")
    if len(question) > _QUESTION_LIMIT:
        raise QuestionError(
            f"the question has {len(question)} characters, expected at most {_QUESTION_LIMIT}; shorten it"
        )
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise QuestionError(
            f"the question holds a lone surrogate at character {error.start}, expected Unicode text; "
            "check how it was decoded"
        ) from error


def _asking(question: str) -> list[Message]:
    return [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}]


def _open_tokenizer(path: str | Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself, there is no narrower class
        raise BundleError(f"{path} is not a readable tokenizer: {error}; {_AGAIN}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
