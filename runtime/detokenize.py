"""Token ids to text while they arrive: whole characters only, and together what one decode would give.

A piece of text is handed out at a clean cut: no UTF-8 character is open there, and no run of SentencePiece
byte tokens (``<0xE4>``), which the decoder judges as a whole: one invalid byte turns all of the run into
U+FFFD. The tokens before the cut stay as context for the next piece, because a decoder may strip the space of
a first token. No token is decoded more than a fixed number of times: linear time, invalid bytes included.

``tokenizers.decoders.DecodeStream`` (0.23) is not used: after invalid bytes it raises or gives other text,
what is left at the end cannot be fetched, and invalid bytes take it quadratic time.

Does not look for stop tokens or stop strings, and does not clean up spaces.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

__all__ = ["Detokenizer"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8  # tokens of a byte or more: an open character (3 bytes) behind one cut in two (3), and spare


class Detokenizer:
    """Text of one answer; special tokens and ids without text are skipped.

    The pieces of every ``push`` and the last ``flush``, joined, equal ``tokenizer.decode(ids)``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}
        self._context: list[int] = []  # the piece handed out last
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that became complete with ``token``; often empty, never half a character."""
        content = self._tokenizer.id_to_token(token)
        if content is None or content in self._special:
            return ""
        self._pending.append(token)
        return "" if self._is_open(content) else self._cut()

    def flush(self) -> str:
        """What is left at the end of the answer, U+FFFD where a character never became complete."""
        return self._cut() if self._pending else ""

    def _is_open(self, content: str) -> bool:
        """Whether the text could still change after the last token, ``content``."""
        if _BYTE_TOKEN.fullmatch(content):
            return True
        return self._text(self._pending[-_TAIL:]).endswith(_UNFINISHED)

    def _cut(self) -> str:
        piece = self._text(self._context + self._pending)[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._text(self._context)
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
