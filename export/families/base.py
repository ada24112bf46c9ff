"""What a family tells the exporter: a ``Backbone`` made from a checkpoint's files.

A family is one file of facts beside this one: which ``config.json`` it recognises and how it fills a ``Backbone``
from shared towers, connectors and the decoder. Nothing outside that file asks which family it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from export.checkpoint import Checkpoint
from export.decoder import DecoderConfig
from export.load import Names
from runtime.errors import CheckpointError
from runtime.preprocess import Preprocess

__all__ = [
    "Backbone",
    "Family",
    "Field",
    "PromptFacts",
    "divided",
    "field",
    "one_of",
    "optional",
    "positive",
    "shortened",
    "size",
]

Field = TypeVar("Field")

LARGEST = 2**24  # of any width, vocabulary or context; no published model comes near
LONGEST_SHOWN = 80  # characters of a value in an error message


@dataclass(frozen=True)
class PromptFacts:
    """How the family puts a video and a question into text.

    Attributes:
        system: the system text a conversation starts with.
        templates: jinja2 chat templates by layout; "video" (LinVT's rows) and "frames" (no LinVT: every frame's
            tokens) must be there, "training" where LinVT's training data stood otherwise in the prompt.
            They see ``messages``, ``system``, ``visual_token``, ``frames`` and ``tokens``.
        visual_token: the placeholder whose embedding rows are replaced.
        end_token: ends an answer.
        reserved: control tokens that a question may not contain.
    """

    system: str
    templates: Mapping[str, str]
    visual_token: str
    end_token: str
    reserved: tuple[str, ...]


@dataclass(frozen=True)
class Backbone:
    """An image-level LLM, ready to be loaded part by part.

    Attributes:
        tokens_per_frame: N, tokens the connector makes of one frame.
        vision: builds tower and connector, unfilled: pixel_values (F, 3, H, W) -> tokens (F, N, D).
        vision_names: from that module's parameters to the checkpoint's.
        decoder: the LLM's sizes.
        decoder_names: from ``Decoder``'s parameters to the checkpoint's.
    """

    family: str
    tokens_per_frame: int
    vision: Callable[[], nn.Module]
    vision_names: Names
    decoder: DecoderConfig
    decoder_names: Names
    preprocess: Preprocess
    prompt: PromptFacts


class Family(Protocol):
    """One file of facts."""

    name: str

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is this family's."""

    def backbone(self, checkpoint: Checkpoint) -> Backbone:
        """Read the facts; raises CheckpointError where a field is missing or not supported."""


def field(config: Mapping[str, Any], path: str, kind: type[Field]) -> Field:
    """The value at a dotted ``path`` of ``config.json``, which must be of ``kind``.

    Raises:
        CheckpointError: absent or of another type; the message names the field.
    """
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"config.json field {path} is {shortened(value)}, expected {kind.__name__}; the checkpoint is incomplete"
        )
    return value


def optional(config: Mapping[str, Any], path: str, default: Field) -> Field:
    """As ``field``, of the type of ``default``, which stands for an absent or null value."""
    value: Any = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else field(config, path, type(default))


def size(config: Mapping[str, Any], path: str, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number within bounds, e.g. a width."""
    value = field(config, path, int)
    if not least <= value <= most:
        raise CheckpointError(f"config.json field {path} is {shortened(value)}, expected {least} to {most}")
    return value


def divided(config: Mapping[str, Any], whole: str, part: str) -> int:
    """How often the size at ``part`` goes into the size at ``whole``, which it must do without a rest."""
    total, each = size(config, whole), size(config, part)
    if total % each:
        raise CheckpointError(f"config.json field {whole} is {total}, expected a multiple of {part}, which is {each}")
    return total // each


def positive(config: Mapping[str, Any], path: str) -> float:
    """A finite number above 0, e.g. an epsilon."""
    value = field(config, path, float)
    if not 0 < value < math.inf:
        raise CheckpointError(f"config.json field {path} is {value}, expected a number above 0")
    return value


def one_of(config: Mapping[str, Any], path: str, *known: Field) -> Field:
    """A choice of which only the ``known`` ones are supported; the first holds where it is absent."""
    value = optional(config, path, known[0])
    if value not in known:
        supported = ", ".join(map(repr, known))
        raise CheckpointError(f"config.json field {path} is {shortened(value)}; supported: {supported}")
    return value


def shortened(value: object) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
