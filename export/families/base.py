"""What a family tells the exporter: a ``Backbone`` made from a checkpoint's files.

A family is one file of facts beside this one: which ``config.json`` it recognises and how it fills a ``Backbone``
from shared towers, connectors and the decoder. Nothing outside that file asks which family it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import nn

from export.checkpoint import Checkpoint
from export.decoder import DecoderConfig
from export.load import Names
from runtime.errors import CheckpointError
from runtime.preprocess import Preprocess

__all__ = ["Backbone", "Family", "Field", "PromptFacts", "field"]

Field = TypeVar("Field")


@dataclass(frozen=True)
class PromptFacts:
    """How the family puts a video and a question into text.

    Attributes:
        system: the system text a conversation starts with.
        templates: jinja2 chat templates by layout; "video" (LinVT's rows) and "frames" (no LinVT: every frame's
            tokens) must be there. They see ``messages``, ``system``, ``visual_token``, ``frames`` and ``tokens``.
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
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(
            f"config.json field {path} is {value!r}, expected {kind.__name__}; the checkpoint is incomplete"
        )
    return value
