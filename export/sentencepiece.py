"""SentencePiece's ``tokenizer.model``: pieces, scores and the few settings that matter, read from the file itself.

The file is one protobuf message of which a handful of fields count, so neither SentencePiece nor protobuf is needed.

Covers the BPE models that Llama, Phi-3 and InternLM2 are published with. Unigram models and tables of normalisations
are refused by name. Encodes nothing: ``slow_tokenizer`` makes a tokenizer of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from export.fields import shortened
from runtime.errors import CheckpointError

__all__ = ["Kind", "Piece", "SentencePiece"]


class Kind(IntEnum):
    """``ModelProto.SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePiece:
    """What a model file says.

    Attributes:
        unknown: index of the piece that stands for text which has no other.
        byte_fallback: such text becomes one piece a byte instead.
        dummy_prefix: a space is put in front of every text.
        collapses: a run of spaces counts as one, and at either end as none.
    """

    pieces: tuple[Piece, ...]
    unknown: int
    byte_fallback: bool
    dummy_prefix: bool
    collapses: bool

    @classmethod
    def read(cls, path: Path) -> SentencePiece:
        """Parse a file.

        Raises:
            CheckpointError: no SentencePiece model, or one of a kind that is not covered.
        """
        try:
            return parsed(path.read_bytes())
        except (OSError, ValueError, IndexError, struct.error) as error:
            raise CheckpointError(
                f"{path} is not a SentencePiece model that can be converted: {error}; add a tokenizer.json"
            ) from error


Message = dict[int, list[bytes]]  # values by field number, numbers as eight little-endian bytes


def parsed(content: bytes) -> SentencePiece:
    """Field numbers are those of ``sentencepiece_model.proto``, and so is what holds where one is absent."""
    model = fields(content)
    trainer, normalizer = (fields(b"".join(model.get(number, []))) for number in (2, 3))
    for message, number, name, default, wanted in (
        (trainer, 3, "model_type", 1, 2),
        (trainer, 24, "treat_whitespace_as_suffix", 0, 0),
        (normalizer, 5, "escape_whitespaces", 1, 1),
    ):
        if (found := integer(message, number, default)) != wanted:
            raise ValueError(f"{name} is {shortened(found)}, supported: {wanted}")
    if any(normalizer.get(2, [])):
        raise ValueError("it normalises text by a table, which is not supported")
    pieces = tuple(piece(fields(part)) for part in model.get(1, []))
    if unused := [each.text for each in pieces if each.kind is Kind.UNUSED]:
        raise ValueError(f"piece {shortened(unused[0])} is switched off, which is not supported")
    unknown = [index for index, each in enumerate(pieces) if each.kind is Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"it has {len(unknown)} pieces for unknown text, expected 1")
    return SentencePiece(
        pieces=pieces,
        unknown=unknown[0],
        byte_fallback=bool(integer(trainer, 35, 0)),
        dummy_prefix=bool(integer(normalizer, 3, 1)),
        collapses=bool(integer(normalizer, 4, 1)),
    )


def piece(message: Message) -> Piece:
    """One vocabulary entry."""
    score = struct.unpack("<f", message[2][-1][:4])[0] if 2 in message else 0.0
    return Piece(b"".join(message.get(1, [])[-1:]).decode(), score, Kind(integer(message, 3, Kind.NORMAL)))


def integer(message: Message, number: int, default: int) -> int:
    """A whole number or a choice; the last one counts."""
    return int.from_bytes(message[number][-1], "little") if number in message else default


def fields(content: bytes) -> Message:
    """A protobuf message's fields."""
    found: Message = {}
    for number, value in wire(content):
        found.setdefault(number, []).append(value)
    return found


def wire(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Field numbers and values in the order of the file."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        kind = key & 7
        if kind == 0:
            number, at = varint(content, at)
            yield key >> 3, number.to_bytes(8, "little")
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind} at byte {at}")
        length, at = varint(content, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(content):
            raise ValueError(f"it ends within a field at byte {at}")
        yield key >> 3, content[at : at + length]
        at += length


def varint(content: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next thing begins."""
    value = 0
    for shift in range(0, 64, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError(f"a number has no end at byte {at}")
