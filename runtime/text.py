"""A conversation to token ids: chat template, tokenizer, the places of the visual tokens and LinVT's text input.

The template sees ``messages`` and ``add_generation_prompt`` as in transformers, and besides ``system``; for a video
``visual_token``, ``frames`` (sets of visual tokens) and ``tokens`` (of the video with LinVT, of each set without); for
pictures ``image_token``, ``images`` (how many) and ``image_tokens`` (of each).

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

from runtime.errors import BundleError, OptionError, QuestionError
from runtime.positions import PositionSpec, prompt_positions
from runtime.template import compiled, rendered

__all__ = ["Message", "Prompt", "PromptBuilder", "PromptSpec", "Turn", "Visuals"]

# {"role": str, "content": str or list of {"type": "text", "text": str}, {"type": "video"} and {"type": "image"}}
Message = Mapping[str, Any]
Turn = tuple[str, str]  # an earlier question and its answer
Ids = NDArray[np.int64]

_QUESTION_LIMIT = 1 << 17  # characters
_MARK = "\ue000\ue001"  # private use: no template holds it
_AGAIN = "export the bundle again"


class PromptSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a family wants to be asked; part of the manifest.

    Attributes:
        system: the system text the template is given; None where the template has no place for one.
        visual_token: the token whose rows are replaced by the video, as text and as id.
        visual_id: its id; it may lie outside the embedding table.
        image_token: the token whose rows are replaced by a picture; may be the same.
        image_id: its id.
        stop_ids: ids that end an answer.
        reserved: control tokens that a question must not hold.
        text_input: what LinVT reads: the question's tokens, or the slice the released training code took.
        add_special_tokens: let the tokenizer add its own (a leading ``<s>``) to the prompt.
        rows: prompt tokens whose embedding is another row of the table than their id's.
        merge: visual rows replace those of the placeholders, or are added to them.
    """

    system: str | None = ""
    visual_token: str
    visual_id: int
    image_token: str
    image_id: int
    stop_ids: tuple[int, ...]
    reserved: tuple[str, ...] = ()
    text_input: Literal["question", "released_slice"] = "question"
    add_special_tokens: bool = False
    rows: dict[str, int] = {}
    merge: Literal["replace", "add"] = "replace"

    def __post_init__(self) -> None:
        if not self.visual_token or not self.image_token or not all(self.reserved):
            raise ValueError("visual_token, image_token and every reserved token must have at least one character")
        if min(self.visual_id, self.image_id) < 0 or not self.stop_ids or min(self.stop_ids) < 0:
            raise ValueError("visual_id, image_id and stop_ids must be 0 or more, and there must be a stop id")
        if any(row < 0 for row in self.rows.values()):
            raise ValueError("rows must be 0 or more")


@dataclass(frozen=True)
class Visuals:
    """What a prompt has to find places for.

    Attributes:
        kind: one video, or pictures.
        sets: sets of visual tokens: frames (or groups of them) of the video, or pictures.
        tokens: of the whole video with LinVT, else of each set.
        rows: all visual rows.
        on_grid: the rows are pictures' own tokens, which lie on a grid.
    """

    kind: Literal["video", "image"]
    sets: int
    tokens: int
    rows: int
    on_grid: bool


@dataclass(frozen=True, eq=False)
class Prompt:
    """One question, tokenised.

    Attributes:
        input_ids: (S,) int64, the whole prompt.
        table_rows: (S,) int64, the row of the embedding table that stands for each token.
        position_ids: (axes, S) int64.
        visual_positions: (rows,) int64, ascending: where in ``input_ids`` the visual rows go.
        text_ids: (L,) int64, what LinVT reads as text.
    """

    input_ids: Ids
    table_rows: Ids
    position_ids: Ids
    visual_positions: Ids
    text_ids: Ids


class PromptBuilder:
    """Renders and tokenises prompts of one bundle.

    Args:
        tokenizer_path: the bundle's ``tokenizer.json``.
        template_text: the bundle's ``chat_template.jinja``.
        spec: the manifest's prompt part.
        positions: the manifest's part about positions; None counts on one axis.

    Raises:
        BundleError: one of them is damaged or they do not belong together.
    """

    def __init__(
        self,
        tokenizer_path: str | Path,
        template_text: str,
        spec: PromptSpec,
        positions: PositionSpec | None = None,
    ) -> None:
        self.spec = spec
        self.positions = positions or PositionSpec()
        self.tokenizer = _open_tokenizer(tokenizer_path)
        self._template = compiled(template_text)
        for token, id_ in ((spec.visual_token, spec.visual_id), (spec.image_token, spec.image_id)):
            if (found := self.tokenizer.token_to_id(token)) != id_:
                raise BundleError(
                    f"tokenizer.json gives {token!r} the id {found}, the manifest {id_}; the files do not belong "
                    f"together, {_AGAIN}"
                )
        self._rows = {self.tokenizer.token_to_id(token): row for token, row in spec.rows.items()}
        self._forbidden = dict.fromkeys((spec.visual_token, spec.image_token, *spec.reserved))
        ids = ((self.tokenizer.token_to_id(token), token) for token in self._forbidden)
        self._forbidden_ids = {id_: token for id_, token in ids if id_ is not None}

    def check(self, question: str, *, system: str | None = None, history: Sequence[Turn] = ()) -> None:
        """Refuse a conversation early, before its video is looked at.

        Raises:
            QuestionError: a text that is empty, far too long, not Unicode text, or holds a control token.
            OptionError: a system text where the model has no place for one.
        """
        self._question_ids(question)
        if system is not None:
            if self.spec.system is None:
                raise OptionError("this model's prompt has no place for a system text; leave it out")
            self._text_ids(system, "system text")
        for asked, answered in history:
            self._question_ids(asked)
            self._text_ids(answered, "earlier answer")

    def render(self, messages: Sequence[Message], visuals: Visuals, *, system: str | None = None) -> str:
        """The prompt as text, ending where the answer begins."""
        video = visuals.kind == "video"
        return rendered(
            self._template,
            messages=messages,
            add_generation_prompt=True,
            system=self.spec.system if system is None else system,
            visual_token=self.spec.visual_token,
            frames=visuals.sets if video else 0,
            tokens=visuals.tokens if video else 0,
            image_token=self.spec.image_token,
            images=0 if video else visuals.sets,
            image_tokens=0 if video else visuals.tokens,
        )

    def build(
        self, question: str, visuals: Visuals, *, system: str | None = None, history: Sequence[Turn] = ()
    ) -> Prompt:
        """The prompt for one question about one video, or about pictures.

        Args:
            question: taken as it is, spaces included.
            visuals: what the question is about.
            system: in place of the model's own system text.
            history: earlier questions about the same and their answers.

        Raises:
            QuestionError, OptionError: as ``check``.
            BundleError: the template fails or leaves another number of places than there are rows.
        """
        self.check(question, system=system, history=history)
        question_ids = self._question_ids(question)
        text = self.render(_conversation(question, visuals, history), visuals, system=system)
        encoding = self.tokenizer.encode(text, add_special_tokens=self.spec.add_special_tokens)
        input_ids = np.array(encoding.ids, np.int64)
        token, id_ = (
            (self.spec.visual_token, self.spec.visual_id)
            if visuals.kind == "video"
            else (self.spec.image_token, self.spec.image_id)
        )
        places = np.flatnonzero(input_ids == id_)
        if places.size != visuals.rows:
            raise BundleError(
                f"the prompt holds {token!r} {places.size} times, expected one for each of {visuals.rows} visual "
                f"rows; template and stages do not belong together, {_AGAIN}"
            )
        positions = prompt_positions(len(input_ids), places, self.positions, on_grid=visuals.on_grid)
        text_ids = question_ids
        if self.spec.text_input == "released_slice":
            marked = self.render(_conversation(_MARK, visuals, history), visuals, system=system)
            at = _question_start(text, marked, question)
            head = next(i for i, (_, end) in enumerate(encoding.offsets) if end > at)
            text_ids = input_ids[question_ids.size : question_ids.size + head]
        return Prompt(input_ids, self._table_rows(input_ids, places), positions, places, text_ids)

    def _table_rows(self, input_ids: Ids, places: Ids) -> Ids:
        """The row of the embedding table for each token (S,); any row where a visual one takes its place."""
        rows = np.array([self._rows.get(id_, id_) for id_ in input_ids.tolist()], np.int64)
        if self.spec.merge == "replace":
            rows[places] = 0  # the placeholder's own id may lie outside the table
        return rows

    def _question_ids(self, question: str) -> Ids:
        """The question's own ids (L,), after everything that can be wrong with it was looked for."""
        _check_text(question, "question")
        if not question.strip():
            raise QuestionError("the question is empty; ask something about the video")
        ids = self._text_ids(question, "question")
        if not ids.size:
            raise QuestionError("the question has no text the tokenizer knows; ask in words")
        return ids

    def _text_ids(self, text: str, name: str) -> Ids:
        """Ids (L,) of a text that somebody wrote, which may hold no control token."""
        _check_text(text, name)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        spelled = [token for token in self._forbidden if token in text]
        normalised = [self._forbidden_ids[id_] for id_ in ids if id_ in self._forbidden_ids]
        for token in spelled + normalised:
            raise QuestionError(f"the {name} holds the control token {token!r}; write it without")
        return np.array(ids, np.int64)


def _question_start(text: str, marked: str, question: str) -> int:
    """Where in ``text`` the question begins; a search alone would find a short one in other words too."""
    at = marked.find(_MARK)
    if at < 0 or not text.startswith(question, at):
        raise BundleError(f"the prompt template changes the question, expected it unchanged; {_AGAIN}")
    return at


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str):
        raise QuestionError(f"the {name} is of type {type(text).__name__}, expected str; pass text")
    if len(text) > _QUESTION_LIMIT:
        raise QuestionError(f"the {name} has {len(text)} characters, expected at most {_QUESTION_LIMIT}; shorten it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise QuestionError(
            f"the {name} holds a lone surrogate at character {error.start}, expected Unicode text; "
            "check how it was decoded"
        ) from error


def _conversation(question: str, visuals: Visuals, history: Sequence[Turn]) -> list[Message]:
    """Messages as in transformers; video or pictures stand in the first one."""
    asked = [*(turn[0] for turn in history), question]
    messages: list[Message] = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in asked]
    seen = 1 if visuals.kind == "video" else visuals.sets
    messages[0]["content"][:0] = [{"type": visuals.kind}] * seen
    for index, (_, answer) in enumerate(history):
        messages.insert(2 * index + 1, {"role": "assistant", "content": answer})
    return messages


def _open_tokenizer(path: str | Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself, there is no narrower class
        raise BundleError(f"{path} is not a readable tokenizer: {error}; {_AGAIN}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
